import copy

import pytest
import torch
import torch.nn.functional as F
from lab import FAMILIES, ROWS, tokenizer
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PhiConfig

from neo.data.packing import RowReport, collate
from neo.data.prompt import IGNORE, Example, PromptEncoder
from neo.data.rows import to_conversation
from neo.losses.distillation import Distillation
from neo.losses.divergences import forward_kl
from neo.models.head import head_of
from neo.models.student import inner, trained_parameters
from neo.teachers.online import FrozenTeacher
from neo.training.token_loss import batch_sums, one_later

VOCAB = 60  # of 64 rows: the last are padding


def example(length, *answers):
    """Random tokens; the tokens in each of the spans are answers, predicted from one before."""
    ids = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length))
    targets = torch.full((length,), IGNORE)
    for start, stop in answers:
        targets[start - 1 : stop - 1] = ids[start:stop]
    return Example(ids.tolist(), targets.tolist())


def batch_of(*sequences):
    return collate(sequences, 0, packing=True, report=RowReport())


@pytest.fixture
def batch():
    """Two packed rows: several answers in one example, and answers that end an example."""
    return batch_of(
        [example(8, (4, 8)), example(7, (2, 4), (6, 7)), example(5, (3, 5))], [example(11, (1, 11))]
    )


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def base(family="llama", *, seed=0, tie=False, hidden=32):
    if family == "phi":  # a head with a bias
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(PhiConfig(**SMALL, tie_word_embeddings=tie))
            torch.nn.init.normal_(model.lm_head.bias)
    else:
        model = small(family, seed, tie, hidden)
    return model.double().eval()


def small(family, seed, tie, hidden):
    config, extra = FAMILIES[family]
    sizes = SMALL | {"hidden_size": hidden, "num_key_value_heads": 2, "tie_word_embeddings": tie}
    # Gemma 2 caps its attention scores, which sdpa cannot
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = config(**sizes | extra)
        return AutoModelForCausalLM.from_config(built, attn_implementation="eager")


def adapted(family="llama", *, tie=False, **keys):
    config = LoraConfig(
        **{"target_modules": ["q_proj"], "init_lora_weights": False, "r": 3, **keys}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(base(family, tie=tie), config)


HEAD = {"target_modules": ["q_proj", "lm_head"]}
STUDENTS = {
    "all weights": lambda: base(),
    "all weights, tied": lambda: base(tie=True),
    "all weights, bias": lambda: base("phi"),
    "all weights, tied, soft cap": lambda: base("gemma2", tie=True),
    "branch, not on the head": lambda: adapted(),
    "branch on the head": lambda: adapted(**HEAD),
    "branch on the head, rslora": lambda: adapted(**HEAD, lora_alpha=5, use_rslora=True),
    "branch on the head, ranks": lambda: adapted(
        **HEAD, rank_pattern={"lm_head": 5}, alpha_pattern={"lm_head": 7}
    ),
    "branch on the head, orthogonal": lambda: adapted(
        target_modules=["lm_head"], init_lora_weights="orthogonal", r=4
    ),
    "branch on the head, bias": lambda: adapted("phi", **HEAD),
    "branch on the head, soft cap": lambda: adapted("gemma2", **HEAD),
    "branch on the head, scale": lambda: adapted("granite", **HEAD),
    "copy of the head": lambda: adapted(modules_to_save=["lm_head"]),
    "copy of a tied head": lambda: adapted(tie=True, modules_to_save=["lm_head"]),
    "copy of both tied layers": lambda: adapted(
        tie=True, modules_to_save=["lm_head"], ensure_weight_tying=True
    ),
}


@pytest.fixture(scope="module")
def teacher():
    return base("granite", seed=9, hidden=48).requires_grad_(False)


def forward(model, batch):
    return model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).logits[..., :VOCAB]


def gradients(student, loss):
    student.zero_grad()
    loss.backward()
    named = trained_parameters(student).items()
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}


def assert_same(student, actual, expected):
    torch.testing.assert_close(actual.loss, expected, rtol=1e-9, atol=1e-9)
    ours, plain = gradients(student, actual.loss), gradients(student, expected)
    assert ours.keys() == plain.keys()
    assert ours
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-7, atol=1e-9)
        assert gradient.abs().sum() > 0, name


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", STUDENTS)
def test_loss_and_gradient_of_every_trained_weight_are_those_of_full_logits(name, batch, teacher):
    student = STUDENTS[name]()
    spec = Distillation(kd_ratio=0.3, temperature=2.0)
    keep = batch.targets != IGNORE
    student_logits, teacher_logits = forward(student, batch)[keep], forward(teacher, batch)[keep]
    ce = F.cross_entropy(student_logits, batch.targets[keep], reduction="sum")
    kd = forward_kl(student_logits, teacher_logits, temperature=2.0).sum()
    sums = batch_sums(inner(student), teacher, batch, spec, VOCAB)
    assert_same(student, sums, 0.7 * ce + 0.3 * kd)
    assert sums.tokens == keep.sum()


@pytest.mark.parametrize("name", ["all weights, tied", "branch on the head", "copy of the head"])
def test_release_gives_loss_and_gradients_of_the_released_codes_masks(name, batch, teacher):
    student = STUDENTS[name]()
    ratio = 0.3
    student_logits, teacher_logits = forward(student, batch), forward(teacher, batch)
    labels = torch.full_like(batch.targets, -100)  # as Hugging Face has them: not shifted
    labels[:, 1:] = batch.targets[:, :-1]
    ce = F.cross_entropy(student_logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    unshifted = labels != -100
    kd = F.kl_div(
        student_logits[unshifted].log_softmax(-1),
        teacher_logits[unshifted].softmax(-1),
        reduction="batchmean",
    )
    mean = (1 - ratio) * ce + ratio * kd

    spec = Distillation(kd_ratio=ratio, kd_positions="release")
    sums = batch_sums(inner(student), teacher, batch, spec, VOCAB, kd_positions="release")
    assert_same(student, sums, mean * sums.tokens)
    torch.testing.assert_close(sums.ce / sums.tokens, ce)
    torch.testing.assert_close(sums.kd / sums.tokens, kd)
    aligned = batch_sums(inner(student), teacher, batch, spec, VOCAB)
    assert (aligned.kd - sums.kd).abs() > 1e-3


def test_release_measures_all_but_kd_where_the_cross_entropy_is_taken(batch, teacher):
    student = base()
    spec = Distillation(kd_ratio=0.3)
    released = batch_sums(student, teacher, batch, spec, VOCAB, kd_positions="release")
    aligned = batch_sums(student, teacher, batch, spec, VOCAB)
    for name in ("ce", "tokens", "student_entropy", "agree", "teacher_target", "teacher_mass_out"):
        torch.testing.assert_close(getattr(released, name), getattr(aligned, name))


def positions_reached(student, teacher, batch, kd_positions):
    """Where a loss of the divergence alone has a gradient in the last hidden states."""
    states = []

    def keep(_, __, output):
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    hook = student.get_decoder().register_forward_hook(keep)
    spec = Distillation(kd_ratio=1)
    batch_sums(student, teacher, batch, spec, VOCAB, kd_positions=kd_positions).loss.backward()
    hook.remove()
    return states[0].grad.abs().sum(-1) > 0


def test_release_never_distils_the_first_token_of_an_answer_and_distils_after_the_last(teacher):
    batch = batch_of([example(9, (4, 8))])  # tokens 4 to 7 are the answer
    aligned, released = (
        positions_reached(base(), teacher, batch, kd)[0].nonzero().flatten().tolist()
        for kd in ("aligned", "release")
    )
    assert aligned == [3, 4, 5, 6]  # where tokens 4 to 7 are predicted
    assert released == [4, 5, 6, 7]


def test_release_stays_within_each_packed_example(batch, teacher):
    supervised = batch.targets != IGNORE
    later = one_later(supervised)
    assert torch.equal(positions_reached(base(), teacher, batch, "release"), later)
    assert later.sum() == supervised.sum()
    assert torch.equal(batch.position_ids[later], batch.position_ids[supervised] + 1)


@pytest.mark.parametrize("max_length", [256, 30, 22])
def test_the_last_token_of_an_example_is_never_supervised(max_length):
    encoder = PromptEncoder(tokenizer(), max_length)
    seen = 0
    for row in ROWS:
        try:
            encoded = encoder.encode(to_conversation(row, "prompt_completion"))
        except ValueError:
            continue  # nothing of the answer is left
        assert encoded.targets[-1] == IGNORE
        seen += 1
    assert seen


@pytest.mark.parametrize("kd_positions", ["aligned", "release"])
def test_a_batch_without_a_supervised_token_adds_nothing(teacher, kd_positions):
    student = adapted(**HEAD)
    batch = batch_of([example(6)])
    spec = Distillation()
    sums = batch_sums(inner(student), teacher, batch, spec, VOCAB, kd_positions=kd_positions)
    assert (sums.loss, sums.ce, sums.kd, sums.tokens) == (0, 0, 0, 0)
    for gradient in gradients(student, sums.loss).values():
        assert gradient is None or not gradient.any()


@pytest.mark.parametrize("kd_positions", ["aligned", "release"])
def test_dropout_of_a_branch_on_the_head_is_drawn_once_per_token(batch, teacher, kd_positions):
    student = adapted(target_modules=["lm_head"], lora_dropout=0.4).train()
    spec = Distillation(kd_ratio=0.3)
    targets = batch.targets
    supervised = targets != IGNORE
    compared = one_later(supervised) if kd_positions == "release" else supervised
    used = supervised | compared

    torch.manual_seed(5)
    model = inner(student)
    hidden = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state[used]
    logits = model.lm_head(hidden)[:, :VOCAB]  # PEFT's own forward, with its dropout
    ce = F.cross_entropy(logits[supervised[used]], targets[supervised], reduction="sum")
    kd = forward_kl(logits[compared[used]], forward(teacher, batch)[compared]).sum()

    torch.manual_seed(5)
    sums = batch_sums(model, teacher, batch, spec, VOCAB, kd_positions=kd_positions)
    assert_same(student, sums, 0.7 * ce + 0.3 * kd)
    with torch.no_grad():
        again = batch_sums(model, teacher, batch, spec, VOCAB, kd_positions=kd_positions)
    assert again.loss != sums.loss


def test_a_frozen_head_gets_no_gradient(batch, teacher):
    student = adapted(**HEAD)
    batch_sums(inner(student), teacher, batch, Distillation(), VOCAB).loss.backward()
    head = head_of(inner(student))
    assert head.weight.grad is None
    assert not head.weight.requires_grad


def test_of_a_teacher_apart_only_hidden_states_of_supervised_tokens_travel(batch, teacher):
    travelled = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.to and isinstance(args[-1], torch.device):
                travelled.append(args[0])
            return func(*args, **kwargs or {})

    model = copy.deepcopy(teacher)
    expected = batch_sums(base(), model, batch, Distillation(kd_ratio=0.3), VOCAB)
    apart = FrozenTeacher(model, torch.device("cpu")).model
    student = base()
    with Watch():
        actual = batch_sums(student, apart, batch, Distillation(kd_ratio=0.3), VOCAB)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.kd, expected.kd)
    floats = [t for t in travelled if t.is_floating_point()]
    tokens = int((batch.targets != IGNORE).sum())
    # the student's are on their device; of the teacher nothing else left its own
    assert [tuple(t.shape) for t in floats] == [(tokens, 32), (tokens, 48)]
    assert tokens < batch.targets.numel() / 2
