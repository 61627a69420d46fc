import json
import math

import pytest
import torch
from lab import compose, tiny_model
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from neo.config import ConfigError, validate
from neo.models.causal_lm import CausalLM
from neo.models.moslora import (
    MIXERS,
    MoSLoRAConfig,
    MoSLoRALinear,
    fold_moslora,
    is_moslora,
)
from neo.models.student import build_meta_student, build_student, trained_parameters
from neo.models.variants import lora, moslora
from neo.training.meet import meet

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 3]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def student(folder, seed=0, **keys):
    keys = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **keys}
    return build_student(CausalLM(path=str(folder)), moslora(**keys), CPU, seed).eval()


def shaken(model):
    """The model with every trained weight away from where it began."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in trained_parameters(model).values():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layer(mixer="kaiming", r=3, alpha=5, width=7, rows=6, **keys):
    config = MoSLoRAConfig(r=r, lora_alpha=alpha, mixer=mixer, **keys)
    return MoSLoRALinear(nn.Linear(width, rows), "default", config=config, r=r, lora_alpha=alpha)


def parts(branch):
    """A, W and B of a layer."""
    names = ("lora_A", "lora_mixer", "lora_B")
    return [getattr(branch, name)["default"].weight for name in names]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("rslora", "scaling"), [(False, 5 / 3), (True, 5 / math.sqrt(3))])
def test_output_and_gradients_are_those_of_the_dense_weight_in_float64(mixer, rslora, scaling):
    torch.manual_seed(0)
    branch = layer(mixer, use_rslora=rslora).double()
    a, w, b = parts(branch)
    nn.init.normal_(b)
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    weights_of_outputs = torch.randn(2, 4, 6, dtype=torch.float64)
    output = branch(x)
    (output * weights_of_outputs).sum().backward()

    base = branch.base_layer
    dense = base.weight + scaling * b @ w @ a
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(output, x @ dense.T + base.bias, **exact)
    of_dense = weights_of_outputs.reshape(-1, 6).T @ x.reshape(-1, 7)
    torch.testing.assert_close(b.grad, scaling * of_dense @ (w @ a).T, **exact)
    torch.testing.assert_close(w.grad, scaling * b.T @ of_dense @ a.T, **exact)
    torch.testing.assert_close(a.grad, scaling * (b @ w).T @ of_dense, **exact)
    torch.testing.assert_close(x.grad, weights_of_outputs @ dense, **exact)


def test_a_whole_model_is_that_of_its_dense_weights_in_float64(student_dir):
    model = shaken(student(student_dir, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 2}))
    model = model.double()
    base = CausalLM(path=str(student_dir)).load(CPU, trained=False).double()
    scalings = {"q_proj": 6 / 5, "v_proj": 2 / 3, "down_proj": 6 / 3}
    weights = dict(model.named_parameters())
    changed = 0
    with torch.no_grad():
        for name, module in base.named_modules():
            if (target := name.rpartition(".")[2]) in TARGETS:
                a, w, b = (
                    weights[f"base_model.model.{name}.{part}.default.weight"]
                    for part in ("lora_A", "lora_mixer", "lora_B")
                )
                module.weight.add_(scalings[target] * b @ w @ a)
                changed += 1
    assert changed == 2 * len(TARGETS)
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-12, atol=1e-12)


def test_dropout_is_of_the_input_alone():
    branch = layer(lora_dropout=0.5).train()
    a, w, b = parts(branch)
    nn.init.normal_(b)
    x = torch.ones(3, 7)
    torch.manual_seed(1)
    output = branch(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    assert (dropped == 0).any()
    torch.testing.assert_close(output, branch.base_layer(x) + 5 / 3 * dropped @ (b @ w @ a).T)


def test_the_mixer_begins_as_it_is_told():
    torch.manual_seed(0)
    mixers = {mixer: parts(layer(mixer, r=16, width=32, rows=32))[1].detach() for mixer in MIXERS}
    eye = torch.eye(16)
    assert torch.equal(mixers["identity"], eye)
    torch.testing.assert_close(mixers["orthogonal"] @ mixers["orthogonal"].T, eye)
    assert mixers["orthogonal"].diag().abs().max() < 0.99
    kaiming = mixers["kaiming"]  # a = sqrt 5: uniform within 1 / sqrt r
    assert 0.9 / 4 < kaiming.abs().max() <= 1 / 4
    assert kaiming.std() == pytest.approx(1 / 4 / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_first_step_moves_b_and_the_second_all_three(mixer):
    torch.manual_seed(0)
    branch = layer(mixer)
    optimizer = torch.optim.SGD(parts(branch), lr=0.1)
    x = torch.randn(5, 7)
    moves = []
    for _ in range(2):
        optimizer.zero_grad()
        branch(x).square().sum().backward()
        moves.append([bool(part.grad.abs().max() > 0) for part in parts(branch)])
        optimizer.step()
    assert moves == [[False, False, True], [True, True, True]]


def test_with_the_identity_the_branch_is_lora(student_dir):
    model = shaken(student(student_dir, mixer="identity"))
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    mixers = {name: weights.pop(name) for name in list(weights) if "lora_mixer" in name}
    for mixer in mixers.values():
        mixer.copy_(torch.eye(3))
    plain = lora(r=3, lora_alpha=6, target_modules=TARGETS)
    other = build_student(CausalLM(path=str(student_dir)), plain, CPU, 0).eval()
    set_peft_model_state_dict(other, weights)
    torch.testing.assert_close(logits(model), logits(other))


def test_mixers_are_in_the_adapters_state_and_come_back_from_it(student_dir):
    model = shaken(student(student_dir))
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert sum(name.endswith("lora_mixer.weight") for name in state) == 2 * len(TARGETS)
    other = student(student_dir, seed=1)
    assert (logits(other) - logits(model)).abs().max() > 0.01
    loaded = set_peft_model_state_dict(other, state)
    assert not loaded.unexpected_keys
    assert torch.equal(logits(other), logits(model))


def test_mixers_follow_from_the_seed(student_dir):
    first, again, other = (trained_parameters(student(student_dir, seed)) for seed in (1, 1, 2))
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if "lora_mixer" in name:
            assert not torch.equal(weight, other[name])


def test_merging_and_unmerging_come_back_to_where_they_began(student_dir):
    model = shaken(student(student_dir))
    attached = logits(model)
    base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = base.clone()
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert (base - before).abs().max() > 1e-3
        torch.testing.assert_close(logits(model), attached, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(base, before, rtol=0, atol=1e-6)


def test_a_branch_on_half_precision_weights_is_float32_and_merges_in_their_dtype(student_dir):
    spec = CausalLM(path=str(student_dir), dtype="bfloat16")
    for mixer in MIXERS:
        model = build_student(spec, moslora(r=3, target_modules=TARGETS, mixer=mixer), CPU, 0)
        assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    merged = shaken(model).merge_and_unload(safe_merge=True)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_a_mixer_is_frozen_and_deleted_with_its_adapter(student_dir):
    model = student(student_dir)
    mixers = [p for name, p in model.named_parameters() if "lora_mixer" in name]
    assert all(p.requires_grad for p in mixers)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("plain")
    assert mixers
    assert not any(p.requires_grad for p in mixers)
    model.set_adapter("default")
    assert all(p.requires_grad for p in mixers)
    model.set_adapter("plain")
    model.delete_adapter("default")
    assert not any("lora_mixer" in name for name, _ in model.named_parameters())


def write(folder, model):
    state, config = fold_moslora(model)
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return state


# PEFT 0.21.2 takes the bias of B, a vector, for a shard of a matrix.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 2}},
        {"modules_to_save": ["lm_head"], "target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*(q|k)_proj", "lora_bias": True, "bias": "lora_only"},
    ],
)
def test_folded_it_is_plain_lora_that_gives_the_same_logits(tmp_path, keys):
    folder = tiny_model(tmp_path / "base", family="qwen2", layers=2)  # q, k, v have a bias
    model = shaken(student(folder, **keys))
    expected = logits(model)
    state = write(tmp_path / "adapter", model)
    assert not any("lora_mixer" in name for name in state)
    assert torch.equal(logits(model), expected)  # the student is as it was

    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "mixer" not in told
    assert told["peft_type"] == "LORA"
    assert told["inference_mode"] is True
    assert told["base_model_name_or_path"] == str(folder)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    )
    assert type(loaded.active_peft_config) is LoraConfig
    assert not any(isinstance(module, MoSLoRALinear) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(base) - expected).abs().max() > 0.01


def test_a_branch_with_mixers_is_told_from_one_without(student_dir):
    spec = CausalLM(path=str(student_dir))
    assert is_moslora(student(student_dir))
    assert not is_moslora(build_student(spec, lora(r=3), CPU, 0))
    assert not is_moslora(spec.load(CPU, trained=False))


def test_a_plain_adapter_beside_it_gives_its_own_logits(student_dir):
    model = shaken(student(student_dir))
    mixed = logits(model)
    torch.manual_seed(3)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.set_adapter("plain")
    plain = logits(model)
    alone = PeftModel(
        CausalLM(path=str(student_dir)).load(CPU, trained=False), model.peft_config["plain"]
    )
    set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name="plain"))
    torch.testing.assert_close(plain, logits(alone))
    assert (plain - mixed).abs().max() > 1e-3
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), mixed)
    with model.disable_adapter():
        base = CausalLM(path=str(student_dir)).load(CPU, trained=False)
        torch.testing.assert_close(logits(model), logits(base))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mixer": "zeros"}, "lora.mixer='zeros': must be one of kaiming, orthogonal, identity"),
        ({"init_lora_weights": "pissa"}, "lora.init_lora_weights='pissa': must be true or gauss"),
        ({"init_lora_weights": False}, "lora.init_lora_weights=False: must be true or gaussian"),
        ({"use_dora": True}, "lora.use_dora=True: does not go together with a mixer"),
        ({"kasa_config": {"beta": 0.1}}, "lora.kasa_config=.*: does not go together"),
        ({"fan_in_fan_out": True}, "lora.fan_in_fan_out=True: does not go together"),
        ({"target_parameters": ["x"]}, "lora.target_parameters=.*: does not go together"),
        ({"r": 0}, "lora.r=0: must be an integer of at least 1"),
    ],
)
def test_what_cannot_go_with_a_mixer_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        moslora(**keys)


def test_a_wrong_mixer_on_the_command_line_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"lora\.mixer='zeros': must be one of kaiming, orth"):
        validate(compose("lora=moslora", "lora.mixer=zeros"))
    with pytest.raises(ConfigError, match=r"lora\.mixre: not a key .*did you mean mixer"):
        validate(compose("lora=moslora", "+lora.mixre=identity"))


def test_on_the_head_it_is_refused_by_name(student_dir):
    spec = CausalLM(path=str(student_dir))
    with pytest.raises(ConfigError, match=r"the head of LlamaForCausalLM is a .*\.MoSLoRALinear"):
        meet(spec, None, moslora(r=2, target_modules=["q_proj", "lm_head"]), 64)


def test_on_an_embedding_it_is_refused(student_dir):
    with pytest.raises(ValueError, match=r"unsupported variant combination: \('mixer',\)"):
        student(student_dir, target_modules=["embed_tokens"])


@pytest.mark.parametrize("mixer", MIXERS)
def test_its_shapes_are_known_before_a_weight_is_read(student_dir, mixer):
    variant = moslora(r=3, mixer=mixer)
    meta = build_meta_student(CausalLM(path=str(student_dir)), variant)
    real = build_student(CausalLM(path=str(student_dir)), variant, CPU, 0)
    shapes = [{n: p.shape for n, p in trained_parameters(s).items()} for s in (meta, real)]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in meta.parameters())
