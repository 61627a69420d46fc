import json

import pytest
import torch
import torch.nn.functional as F
from fits import ROWS, fit, history, trained
from lab import tiny_model, write_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from neo.data.prompt import IGNORE

# Eight rows of very unequal length, so that a mean of means is not the mean.
TEXTS = [("Say ok.", "ok"), ("Count to nine.", "1 2 3 4 5 6 7 8 9"), ("Größe?", "天 7 m"),
         ("Repeat AB four times.", "ABABABAB " * 4), ("Yes?", "y"), ("List.", "a, b, c, d, e"),
         ("Add 2 and 5.", "7"), ("Spell it out.", "o n e  t w o  t h r e e")]  # fmt: skip


@pytest.fixture(scope="module")
def eight_rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "eight.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in TEXTS
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def plain_loop(student_dir, teacher_dir, *, steps, kd_ratio, lr, temperature, lora):
    """LLM-Neo from scratch: one row at a time, full logits, no neo."""
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir).eval()
    student = AutoModelForCausalLM.from_pretrained(student_dir)
    if lora:
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        student = get_peft_model(student, config)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss, tokens = torch.zeros(()), 0
        for question, answer in TEXTS:
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            answered = tokenizer(f"{answer}<|im_end|>")["input_ids"]
            prompted = tokenizer(prompt)["input_ids"]
            ids = torch.tensor([prompted + answered])
            where = slice(len(prompted) - 1, len(prompted) + len(answered) - 1)
            student_logits = student(input_ids=ids).logits[0, where]
            with torch.no_grad():
                teacher_logits = teacher(input_ids=ids).logits[0, where]
            ce = F.cross_entropy(student_logits, torch.tensor(answered), reduction="sum")
            kd = temperature**2 * F.kl_div(
                F.log_softmax(student_logits / temperature, -1),
                F.softmax(teacher_logits / temperature, -1),
                reduction="sum",
            )
            loss = loss + (1 - kd_ratio) * ce + kd_ratio * kd
            tokens += len(answered)
        optimizer.zero_grad()
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach() / tokens))
    return losses, {n: p.detach() for n, p in student.named_parameters() if p.requires_grad}


CONSTANT = ("optim.schedule=constant", "optim.warmup_ratio=0", "optim.lr=0.01")


@pytest.mark.parametrize(
    ("method", "kd_ratio", "temperature"), [("neo", 0.5, 1.0), ("neo", 0.9, 2.0), ("kd", 0.5, 1.0)]
)
def test_ten_steps_equal_a_loop_written_from_scratch(
    student_dir, teacher_dir, eight_rows, tmp_path, method, kd_ratio, temperature
):
    expected, weights = plain_loop(
        student_dir, teacher_dir, steps=10, kd_ratio=kd_ratio, lr=0.01,
        temperature=temperature, lora=method == "neo",
    )  # fmt: skip
    fit(
        student_dir, teacher_dir, tmp_path, f"method={method}", f"data.path={eight_rows}",
        f"loss.kd_ratio={kd_ratio}", f"loss.temperature={temperature}", *CONSTANT,
        "data.batch_size=4", "data.packing=false", "trainer.accumulate_grad_batches=2",
        "trainer.max_epochs=10",
    )  # fmt: skip
    actual = history(tmp_path, "train/loss")
    assert len(actual) == 10
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert expected[-1] < expected[0] - 0.1  # it does learn
    ours = trained(tmp_path)
    assert ours
    for name, value in weights.items():
        torch.testing.assert_close(ours[name.replace(".default", "")], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["neo", "kd"])
def test_micro_batches_of_any_size_give_the_same_weights(
    student_dir, teacher_dir, eight_rows, tmp_path, method
):
    for rows, accumulate in ((8, 1), (4, 2), (1, 8)):
        fit(
            student_dir, teacher_dir, tmp_path / str(rows), f"method={method}",
            f"data.path={eight_rows}", f"data.batch_size={rows}", *CONSTANT[:2],
            "data.packing=false",
            f"trainer.accumulate_grad_batches={accumulate}", "trainer.max_epochs=3",
            "trainer.gradient_clip_val=0.1", "optim.lr=0.002",
        )  # fmt: skip
    first = trained(tmp_path / "8")
    for rows in ("4", "1"):
        for name, value in trained(tmp_path / rows).items():
            torch.testing.assert_close(value, first[name], rtol=1e-4, atol=2e-5)


def test_packing_changes_nothing(student_dir, teacher_dir, eight_rows, tmp_path):
    for packing in ("true", "false"):
        fit(
            student_dir, teacher_dir, tmp_path / packing, f"data.path={eight_rows}", *CONSTANT,
            f"data.packing={packing}", "data.batch_size=8", "trainer.max_epochs=4",
        )  # fmt: skip
    packed, plain = (history(tmp_path / p, "train/loss") for p in ("true", "false"))
    assert len(packed) == len(plain) == 4
    torch.testing.assert_close(torch.tensor(packed), torch.tensor(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["sft", "lora", "kd", "neo"])
def test_only_what_is_trained_changes_and_the_teacher_never(
    student_dir, teacher_dir, eight_rows, tmp_path, method, monkeypatch
):
    from neo.training.module import NeoModule

    seen = {}
    on_train_start, on_train_end = NeoModule.on_train_start, NeoModule.on_train_end

    def snapshot(module):
        return {n: p.detach().clone() for n, p in module.named_parameters()}

    def start(self):
        on_train_start(self)
        seen["before"] = snapshot(self)

    def end(self):
        on_train_end(self)
        seen["after"] = snapshot(self)

    monkeypatch.setattr(NeoModule, "on_train_start", start)
    monkeypatch.setattr(NeoModule, "on_train_end", end)
    record = fit(
        student_dir, teacher_dir, tmp_path, f"method={method}", f"data.path={eight_rows}",
        "optim.lr=0.05", "trainer.max_steps=3", "trainer.max_epochs=-1",
    )  # fmt: skip
    before, after = seen["before"], seen["after"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    branch = method in ("lora", "neo")
    expected = {n for n in before if n.startswith("student.") and (not branch or "lora_" in n)}
    assert changed == expected
    assert sum(before[n].numel() for n in expected) == record.num_trainable_parameters
    assert any(n.startswith("teacher.") for n in before)


def test_every_supervised_token_appears_once_per_epoch(student_dir, tmp_path):
    tokens = {}
    for packing in ("true", "false"):
        folder = tmp_path / packing
        record = fit(
            student_dir, None, folder, "method=sft", f"data.packing={packing}",
            "data.batch_size=2", "trainer.max_epochs=1",
        )  # fmt: skip
        tokens[packing] = record.num_tokens
    from neo.data.prompt import PromptEncoder
    from neo.data.rows import BadRow, to_conversation

    encoder = PromptEncoder(AutoTokenizer.from_pretrained(student_dir), 128)
    expected = 0
    for line in (ROWS / "messages.jsonl").read_text().splitlines():
        try:
            example = encoder.encode(to_conversation(json.loads(line), "messages"))
        except BadRow:
            continue
        expected += sum(target != IGNORE for target in example.targets)
    assert tokens == {"true": expected, "false": expected}


def test_kd_ratio_0_is_plain_training_and_1_ignores_the_labels(
    student_dir, teacher_dir, eight_rows, tmp_path
):
    def loss(name, *overrides):
        fit(student_dir, teacher_dir, tmp_path / name, f"data.path={eight_rows}", *CONSTANT,
            "data.batch_size=8", "trainer.max_epochs=3", *overrides)  # fmt: skip
        return trained(tmp_path / name)

    plain, zero = loss("lora", "method=lora"), loss("zero", "loss.kd_ratio=0")
    for name, value in plain.items():
        torch.testing.assert_close(zero[name], value, rtol=0, atol=0)
    fit(student_dir, teacher_dir, tmp_path / "one", f"data.path={eight_rows}", *CONSTANT,
        "data.batch_size=8", "trainer.max_epochs=3", "loss.kd_ratio=1")  # fmt: skip
    assert history(tmp_path / "one", "train/loss") == history(tmp_path / "one", "train/kd")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it compiles
def test_compiled_layers_train_what_layers_train(tmp_path):
    student = tiny_model(tmp_path / "student", layers=1, seed=1)
    # unpacked and in their order, rows of one length: compiling on a CPU takes half a minute a time
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "abc", "completion": "cba"}] * 8)
    overrides = (
        f"data.path={rows}", "method=lora", "data.packing=false", "data.shuffle=false",
        "data.batch_size=2", "trainer.max_steps=4", "optim.lr=1e-2",
    )  # fmt: skip
    fit(student, None, tmp_path / "plain", *overrides)
    fit(student, None, tmp_path / "compiled", *overrides, "torch_compile=true")
    plain, compiled = trained(tmp_path / "plain"), trained(tmp_path / "compiled")
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-5)
