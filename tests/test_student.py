import pytest
import torch
from lab import tiny_model, tokenizer
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from neo.models.causal_lm import CausalLM
from neo.models.start import start_of
from neo.models.student import (
    PROBE,
    build_meta_student,
    build_student,
    inner,
    logits_on,
    save_student,
    trained_parameters,
)
from neo.models.variants import lora, lora_fa, moslora, none

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8]])


def build(folder, variant, seed=0):
    return build_student(CausalLM(path=str(folder)), variant, CPU, seed)


def began_with(student):
    return start_of(student).tensors


def test_a_fresh_branch_does_not_change_the_output(student_dir):
    base = CausalLM(path=str(student_dir)).load(CPU, trained=False)
    student = build(student_dir, lora(r=4)).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, base(IDS).logits)


def test_a_branch_follows_from_the_seed_and_leaves_the_random_state_alone(student_dir):
    state = torch.get_rng_state()
    first, again, other = (build(student_dir, lora(r=4), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    differ = []
    for name, weight in trained_parameters(first).items():
        assert torch.equal(weight, trained_parameters(again)[name])
        if "lora_A" in name:
            differ.append(not torch.equal(weight, trained_parameters(other)[name]))
    assert all(differ)


def test_a_student_is_in_train_mode(student_dir):
    assert build(student_dir, lora(r=4)).training
    assert build(student_dir, none()).training


def test_what_is_trained_is_named_and_tied_weights_are_named_once(tmp_path, student_dir):
    names = trained_parameters(build(student_dir, lora(r=4))).keys()
    assert all("lora_" in name for name in names)
    tied = tiny_model(tmp_path / "tied", tie=True)
    names = trained_parameters(build(tied, none())).keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_the_student_on_the_meta_device_trains_what_the_real_one_trains(student_dir):
    for variant in (lora(r=4, target_modules=["q_proj"]), none()):
        meta = build_meta_student(CausalLM(path=str(student_dir)), variant)
        real = build(student_dir, variant)
        shapes = [{n: p.shape for n, p in trained_parameters(s).items()} for s in (meta, real)]
        assert shapes[0] == shapes[1]
        assert all(p.is_meta for p in meta.parameters())


def test_the_model_inside_is_the_causal_lm_itself(student_dir):
    for variant in (lora(r=4), none()):
        model = inner(build(student_dir, variant))
        assert type(model).__name__ == "LlamaForCausalLM"


def test_a_branch_is_saved_as_an_adapter_that_plain_peft_loads(student_dir, tmp_path):
    student = build(student_dir, lora(r=4)).eval()
    with torch.no_grad():
        for weight in trained_parameters(student).values():
            weight.normal_(std=0.1)
        expected = student(IDS).logits
    assert save_student(student, tokenizer(), tmp_path) == tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(student_dir)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, expected)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "adapter").get_vocab() == tokenizer().get_vocab()
    )


def test_a_student_without_a_branch_is_saved_as_a_model_that_plain_transformers_loads(
    student_dir, tmp_path
):
    student = build(student_dir, none()).eval()
    with torch.no_grad():
        student.lm_head.weight.add_(0.5)
        expected = student(IDS).logits
    assert save_student(student, tokenizer(), tmp_path) == tmp_path / "model"
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(loaded(IDS).logits, expected)


# PEFT 0.21 cannot convert these; we can
PATTERNS_OF_RSLORA = pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_patt")
CHANGING = ("pissa", "pissa_niter_16", "olora")
PROBED = torch.arange(3, 67).view(2, 32)


def linear(**keys):
    """LoRA on all linear layers."""
    return lora(**{"r": 4, "target_modules": "all-linear", **keys})


def moved(student, seed=1, by=0.1):
    """The student as if it had been trained, far from where it began."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for weight in trained_parameters(student).values():
            weight += by * torch.randn_like(weight)
    return student.eval()


def reloaded(student, base_dir, folder, **load):
    """What was saved, in plain PEFT on the base as it lies on disk."""
    save_student(student, tokenizer(), folder)
    base = AutoModelForCausalLM.from_pretrained(base_dir, **load)
    return PeftModel.from_pretrained(base, folder / "adapter").eval()


def largest_share(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def frozen(student):
    return {n: p for n, p in inner(student).named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("init", CHANGING)
def test_a_branch_that_starts_from_the_base_changes_no_output(student_dir, init):
    base = CausalLM(path=str(student_dir)).load(CPU, trained=False)
    student = build(student_dir, linear(lora_alpha=6, init_lora_weights=init))
    assert largest_share(logits_on(student, PROBED), logits_on(base, PROBED)) < 1e-5
    layer = inner(student).model.layers[0].mlp.up_proj
    assert not torch.equal(layer.base_layer.weight, base.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("init", CHANGING)
def test_what_is_left_of_the_base_is_what_the_paper_says(student_dir, init):
    spec = CausalLM(path=str(student_dir))
    whole = spec.load(CPU, trained=False).model.layers[1].self_attn.v_proj.weight.double()
    student = build(student_dir, linear(lora_alpha=6, init_lora_weights=init))
    rest = inner(student).model.layers[1].self_attn.v_proj.base_layer.weight.double()
    if init == "olora":
        q, r = torch.linalg.qr(whole)
        taken = 1.5 * q[:, :4] @ r[:4]  # alpha / r: only alpha = r takes Q R itself
    else:
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        taken = u[:, :4] * s[:4] @ v[:4]
    within = 0.05 if "niter" in init else 1e-5
    torch.testing.assert_close(rest, whole - taken, rtol=0, atol=within)
    assert taken.abs().max() > 0.1


@pytest.mark.parametrize("init", CHANGING)
def test_a_start_follows_from_the_seed_to_the_bit(student_dir, init):
    variant = linear(init_lora_weights=init)
    first = build(student_dir, variant, seed=3)
    torch.rand(5)  # whatever was drawn between two builds
    again = build(student_dir, variant, seed=3)
    for parts in (frozen, trained_parameters, began_with):
        assert parts(first).keys() == parts(again).keys()
        assert parts(first)
        assert all(torch.equal(value, parts(again)[name]) for name, value in parts(first).items())


@PATTERNS_OF_RSLORA
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("init", CHANGING)
def test_a_start_that_was_kept_gives_the_same_student_without_another_svd(
    student_dir, init, dtype, monkeypatch
):
    spec = CausalLM(path=str(student_dir), dtype=dtype)
    variant = linear(use_rslora=True, rank_pattern={"up_proj": 2}, init_lora_weights=init)
    first = build_student(spec, variant, CPU, 0)
    for name in ("torch.linalg.svd", "torch.linalg.qr", "torch.svd_lowrank"):
        monkeypatch.setattr(name, None)
    again = build_student(spec, variant, CPU, 1, start_of(first))
    for parts in (frozen, trained_parameters, began_with):
        assert all(torch.equal(value, parts(again)[name]) for name, value in parts(first).items())
    assert again.active_peft_config.init_lora_weights == init


def test_the_start_is_a_copy_that_training_does_not_move_and_no_state_dict_holds(student_dir):
    student = build(student_dir, linear(init_lora_weights="pissa"))
    before = {name: value.clone() for name, value in began_with(student).items()}
    held = len(student.state_dict())
    moved(student)
    assert len(before) == 2 * 7 * 2
    assert all(torch.equal(value, before[name]) for name, value in began_with(student).items())
    assert held == len(build(student_dir, linear()).state_dict())
    assert start_of(build(student_dir, linear())) is None


KEYS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"up_proj": 3}},
    "rslora with patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "down_proj": 7},
        "alpha_pattern": {"up_proj": 3},
    },
    "dora": {"use_dora": True, "lora_dropout": 0.5, "rank_pattern": {"o_proj": 3}},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "a trained copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@PATTERNS_OF_RSLORA
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("init", [True, "pissa", "olora"])
def test_what_is_saved_gives_the_students_logits_on_the_untouched_base(
    student_dir, tmp_path, init, keys
):
    variant = lora(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **keys},
                   init_lora_weights=init)  # fmt: skip
    student = moved(build(student_dir, variant))
    loaded = reloaded(student, student_dir, tmp_path)
    expected = logits_on(student, PROBED)
    assert largest_share(logits_on(loaded, PROBED), expected) < 1e-5
    base = AutoModelForCausalLM.from_pretrained(student_dir)
    assert largest_share(logits_on(base, PROBED), expected) > 0.01
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, LoraLayer)}
    twice = 1 if init is True else 2
    for name, ours in ((n, m) for n, m in student.named_modules() if isinstance(m, LoraLayer)):
        assert layers[name].r["default"] == twice * ours.r["default"]
        assert layers[name].scaling["default"] == pytest.approx(ours.scaling["default"], rel=1e-12)
    merged = loaded.merge_and_unload(safe_merge=True)
    assert largest_share(logits_on(merged, PROBED), expected) < 1e-5


@pytest.mark.parametrize(
    "variant",
    [lora_fa(r=4), moslora(r=4), moslora(r=4, mixer="orthogonal", use_rslora=True)],
    ids=["lora_fa", "moslora", "moslora orthogonal"],
)
def test_variants_of_our_own_are_saved_as_plain_lora(student_dir, tmp_path, variant):
    student = moved(build(student_dir, variant))
    loaded = reloaded(student, student_dir, tmp_path)
    assert largest_share(logits_on(loaded, PROBED), logits_on(student, PROBED)) < 1e-5
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_A" in name or "lora_B" in name for name in state)


def test_adapters_of_different_variants_on_one_base_each_give_their_own_logits(
    student_dir, tmp_path
):
    variants = {
        "lora": linear(),
        "pissa": linear(r=3, init_lora_weights="pissa", use_rslora=True),
        "olora": linear(init_lora_weights="olora"),
        "dora": linear(r=2, use_dora=True),
        "moslora": moslora(r=4),
    }
    model, expected = None, {}
    base = AutoModelForCausalLM.from_pretrained(student_dir)
    untouched = logits_on(base, PROBED)
    for seed, (name, variant) in enumerate(variants.items()):
        student = moved(build(student_dir, variant), seed)
        expected[name] = logits_on(student, PROBED)
        folder = save_student(student, tokenizer(), tmp_path / name)
        if model is None:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            model.load_adapter(folder, name)
    for name in [*expected, *reversed(expected)]:
        model.set_adapter(name)
        assert largest_share(logits_on(model, PROBED), expected[name]) < 1e-5
        others = [o for n, o in expected.items() if n != name]
        assert all(largest_share(o, expected[name]) > 0.01 for o in others)
    with model.disable_adapter():
        torch.testing.assert_close(logits_on(model, PROBED), untouched, rtol=0, atol=0)


@pytest.mark.parametrize("init", CHANGING)
def test_in_bfloat16_only_the_rounding_of_what_is_left_of_the_base_differs(
    student_dir, tmp_path, init
):
    spec = CausalLM(path=str(student_dir), dtype="bfloat16")
    student = moved(build_student(spec, linear(init_lora_weights=init), CPU, 0), by=0.02)
    loaded = reloaded(student, student_dir, tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in frozen(student).values()} == {torch.bfloat16}
    expected = logits_on(student, PROBED)
    assert largest_share(logits_on(loaded, PROBED), expected) < 5e-2
    # with the rounding undone it is exact
    student.float(), loaded.float()
    for name, layer in student.named_modules():
        if isinstance(layer, LoraLayer):
            other = loaded.get_submodule(name)
            start = began_with(student)
            taken = start[f"{name}.lora_B.weight"] @ start[f"{name}.lora_A.weight"]
            layer.base_layer.weight.data = (
                other.base_layer.weight.data - layer.scaling["default"] * taken
            )
    assert largest_share(logits_on(loaded, PROBED), logits_on(student, PROBED)) < 1e-5


@pytest.mark.parametrize(
    "build_any", [build, lambda d, v: build_meta_student(CausalLM(path=str(d)), v)]
)
@pytest.mark.parametrize("init", CHANGING)
def test_a_rank_past_that_of_a_layer_is_refused_where_the_layer_gives_the_directions(
    student_dir, init, build_any
):
    with pytest.raises(
        ValueError, match=r"lora.r=20: .*k_proj is a layer of rank 16, and init_lor"
    ):
        build_any(student_dir, linear(r=20, init_lora_weights=init))
    narrow = {"k_proj": 16, "v_proj": 16}
    build_any(
        student_dir,
        linear(r=20, init_lora_weights=init, rank_pattern=narrow),
    )


def test_a_start_that_could_not_be_exported_is_refused(student_dir):
    variant = linear(init_lora_weights="pissa", target_modules=["q_proj"],
                   target_parameters=["layers.0.mlp.up_proj.weight"])  # fmt: skip
    with pytest.raises(ValueError, match=r"lora.target_parameters=\['layers.0.*cannot|only target"):
        build(student_dir, variant)


def test_a_probe_is_saved_with_what_the_student_says_and_leaves_it_in_its_mode(
    student_dir, tmp_path
):
    student = moved(build(student_dir, linear(lora_dropout=0.5))).train()
    save_student(student, tokenizer(), tmp_path)
    assert student.training
    probe = load_file(tmp_path / PROBE)
    assert probe["input_ids"].unique().numel() == 32
    torch.testing.assert_close(
        probe["logits"], student.eval()(probe["input_ids"]).logits.detach(), rtol=1e-5, atol=1e-5
    )
