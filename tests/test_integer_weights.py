import importlib
from importlib.util import find_spec

import pytest
import torch
from fits import fit, history
from lab import FAMILIES, compose, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from neo.config import ConfigError, validate
from neo.models import integer_weights as module
from neo.models import quantization
from neo.models.causal_lm import CausalLM
from neo.models.hidden import hidden_states
from neo.models.integer_weights import GROUP_SIZES, INTEGERS, check_fit, integer_problems
from neo.models.quantization import quantization_problems
from neo.models.student import logits_on
from neo.teachers.online import OnlineTeacher
from neo.training.frozen_linear import speed_up_frozen

CPU, META = torch.device("cpu"), torch.device("meta")
IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 4], [11, 12, 13, 2, 1, 40, 41]])
# torchao has kernels for a CPU: all but speed and memory is tested there.
with_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="needs pip install 'llm-neo[ao]'"
)


@pytest.fixture
def installed(monkeypatch):
    """As on a machine with torchao."""
    monkeypatch.setattr(module, "is_torchao_available", lambda version: True)


@pytest.fixture(scope="session")
def wide_dir(tmp_path_factory):
    """A teacher whose weights fit groups of 32 and of 64."""
    return tiny_model(tmp_path_factory.mktemp("wide") / "teacher", hidden=64, seed=2)


def problems(*overrides):
    config = compose("trainer=cpu", *overrides)
    validate(config)
    return list(quantization_problems(config))


def integers(folder, kind, **keys):
    return OnlineTeacher(path=str(folder), quantization=kind, **keys)


def linear_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def stands_for(layer):
    """The weights that a layer multiplies by: what it makes of the identity."""
    with torch.no_grad():
        return (layer(torch.eye(layer.in_features)) - (0 if layer.bias is None else layer.bias)).T


@with_torchao
@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_the_head_is_integer(family, tie, kind, tmp_path):
    # heads of 16, so that what gives keys has 32 rows
    folder = tiny_model(tmp_path, family=family, tie=tie, hidden=64, head_dim=16)
    model = integers(folder, kind).load(CPU, trained=False)
    layers = linear_layers(model)
    head = layers.pop("lm_head")
    assert type(head.weight) is nn.Parameter
    assert (head.weight is model.get_input_embeddings().weight) == tie
    assert len(layers) == 14
    assert all(type(layer.weight) is not nn.Parameter for layer in layers.values())
    for layer in layers.values():
        held = [getattr(layer.weight, name) for name in layer.weight.__tensor_flatten__()[0]]
        integer = sum(t.numel() * t.element_size() for t in held if not t.is_floating_point())
        floats = sum(t.numel() for t in held if t.is_floating_point())
        rows, columns = layer.weight.shape
        if kind == "int8":
            assert floats == rows
            assert integer in (rows * columns, rows * columns + rows)  # zero points, all zero
        else:
            assert integer == rows * columns / 2
            assert floats == 2 * rows * columns / 32


@with_torchao
@pytest.mark.parametrize("kind", INTEGERS)
def test_an_integer_model_says_what_its_weights_stand_for(kind, wide_dir):
    dtype = "float32"  # slow for int4, but what it says is not rounded
    model = integers(wide_dir, kind, dtype=dtype).load(CPU, trained=False)
    said = logits_on(model, IDS)
    full = CausalLM(path=str(wide_dir)).load(CPU, trained=False)
    error = (logits_on(full, IDS) - said).abs().max()
    for name, layer in linear_layers(full).items():
        if name != "lm_head":
            layer.weight.data = stands_for(model.get_submodule(name))
    torch.testing.assert_close(logits_on(full, IDS), said, rtol=1e-4, atol=1e-4)
    assert error > 1e-2


@with_torchao
@pytest.mark.parametrize(("kind", "size"), [("int8", None), ("int4", 32), ("int4", 64)])
def test_no_weight_is_further_off_than_half_a_step_of_its_group(kind, size, wide_dir):
    spec = integers(wide_dir, kind, quantization_group_size=size, dtype="float32")
    model = spec.load(CPU, trained=False)
    full = linear_layers(CausalLM(path=str(wide_dir)).load(CPU, trained=False))
    full.pop("lm_head")
    worst = []
    for name, layer in full.items():
        weight = layer.weight.detach()
        groups = weight.view(len(weight), -1, size or weight.shape[1])
        if kind == "int8":  # 255 steps about 0
            step = groups.abs().amax(-1, keepdim=True) / 127.5
        else:  # 16 levels, from the lowest to the highest
            lowest = groups.amin(-1, keepdim=True).clamp(max=0)
            step = (groups.amax(-1, keepdim=True).clamp(min=0) - lowest) / 15
        off = (stands_for(model.get_submodule(name)).view_as(groups) - groups).abs()
        # the highest of the 255 steps about 0 is half a step short of the largest weight
        worst.append((off / step).max())
        assert worst[-1] < (1.02 if kind == "int8" else 0.51), name
    assert max(worst) > 0.45


@with_torchao
def test_smaller_groups_are_nearer_to_the_weights(wide_dir):
    full = logits_on(CausalLM(path=str(wide_dir)).load(CPU, trained=False), IDS)
    off = [
        (logits_on(spec.load(CPU, trained=False), IDS) - full).norm()
        for spec in (
            integers(wide_dir, "int8"),
            integers(wide_dir, "int4", quantization_group_size=32),
            integers(wide_dir, "int4", quantization_group_size=64),
        )
    ]
    assert off == sorted(off)
    assert off[0] < off[1] / 4


@with_torchao
@pytest.mark.parametrize("kind", INTEGERS)
def test_quantising_changes_nothing_for_the_rest_of_the_process(kind, wide_dir):
    inductor = importlib.import_module("torch._inductor.config")
    before = inductor.save_config_portable(), torch.get_float32_matmul_precision()
    integers(wide_dir, kind).load(CPU, trained=False)
    after = inductor.save_config_portable(), torch.get_float32_matmul_precision()
    assert after == before


@with_torchao
@pytest.mark.parametrize("kind", INTEGERS)
def test_integer_layers_are_not_sped_up(kind, wide_dir):
    model = integers(wide_dir, kind).load_frozen(CPU).model
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    expected = hidden_states(model, IDS, positions)
    speed_up_frozen(model.get_decoder())
    assert {type(m) for m in linear_layers(model).values()} == {nn.Linear}
    assert torch.equal(hidden_states(model, IDS, positions), expected)


@with_torchao
@pytest.mark.parametrize("settings", [
    ["teacher.quantization=int8"],
    ["teacher.quantization=int8", "trainer.precision=bf16-mixed"],
    ["teacher.quantization=int4", "teacher.quantization_group_size=64"],
    ["teacher.quantization=int4", "trainer.precision=bf16-mixed"],
    ["teacher.quantization=int4", "trainer.precision=bf16-mixed", "teacher.device=cpu"],
])  # fmt: skip
def test_a_student_learns_from_an_integer_teacher(settings, student_dir, wide_dir, tmp_path):
    common = ["trainer.max_steps=2", "trainer.max_epochs=-1"]
    of_full = [s for s in settings if "quantization" not in s]
    assert fit(student_dir, wide_dir, tmp_path / "integer", *common, *settings).status == "ok"
    assert fit(student_dir, wide_dir, tmp_path / "full", *common, *of_full).status == "ok"
    (actual, *_), (expected, *_) = (
        history(tmp_path / name, "train/kd") for name in ("integer", "full")
    )
    assert actual != expected
    assert actual == pytest.approx(expected, rel=0.01 if "int8" in settings[0] else 0.1)


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_a_group_that_does_not_divide_a_row_is_refused_before_weights_are_read(size, tmp_path):
    spec = integers(tiny_model(tmp_path, hidden=96), "int4", quantization_group_size=size)
    if size == 32:
        assert spec.meta().config.hidden_size == 96
        return
    with pytest.raises(ValueError, match="quantization='int4'") as error:
        spec.meta()
    assert str(error.value) == (
        "quantization='int4': layers.0.self_attn.q_proj has 96 columns, which are no multiple of "
        f"a group of {size}; use quantization_group_size=32, or quantization=int8"
    )


def test_a_model_of_no_fitting_group_is_offered_int8_alone(tmp_path):
    with pytest.raises(ValueError, match=r"a group of 32; use quantization=int8$"):
        integers(tiny_model(tmp_path, hidden=48), "int4").meta()


def test_rows_that_a_cpu_cannot_take_are_refused_there(tmp_path, installed):
    spec = integers(tiny_model(tmp_path, hidden=64, num_key_value_heads=1, head_dim=8), "int4")
    meta = spec.meta()
    with pytest.raises(ValueError, match=r"k_proj has 8 rows, which on a CPU must be a multiple"):
        spec.load(CPU, trained=False)
    check_fit(meta, "int4", 32, torch.device("cuda"))
    check_fit(meta, "int8", 32, CPU)


def test_a_model_whose_weights_lie_in_no_linear_layer_is_refused():
    small = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(**small))
    with pytest.raises(ValueError, match=r"of the \d+ weights between embedding and head only 0 "):
        check_fit(model, "int8", 32, META)


def test_a_group_size_is_of_int4_alone():
    keys = {"path": "neo://mini-teacher", "quantization_group_size": 64}
    for kind in (None, "int8", "nf4"):
        with pytest.raises(ValueError, match=r"quantization_group_size=64: is of quantization=int"):
            OnlineTeacher(quantization=kind, **keys)
    with pytest.raises(ValueError, match=r"quantization_group_size=48: must be null or one of 32,"):
        OnlineTeacher(quantization="int4", **keys | {"quantization_group_size": 48})
    assert OnlineTeacher(quantization="int4", **keys).group_size == 64
    assert OnlineTeacher(path=None, quantization="int4").group_size == 32


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_student_of_integers_is_refused(kind):
    with pytest.raises(ConfigError) as error:
        problems(f"student.quantization={kind}")
    (problem,) = error.value.problems
    assert f"quantization='{kind}': must be null or one of nf4, fp4; integers are for" in problem


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_missing_torchao_is_named_with_what_installs_it(kind, wide_dir, monkeypatch):
    monkeypatch.setattr(module, "is_torchao_available", lambda version: False)
    (problem,) = problems(f"teacher.quantization={kind}")
    assert problem == (
        f"teacher.quantization='{kind}': needs torchao, version 0.18 or later; "
        "pip install 'llm-neo[ao]'"
    )
    with pytest.raises(ValueError, match=rf"quantization='{kind}': needs torchao.*neo\[ao\]"):
        integers(wide_dir, kind).load(CPU, trained=False)


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_cpu_is_enough(kind, installed):
    assert problems(f"teacher.quantization={kind}") == []
    assert problems(f"teacher.quantization={kind}", "teacher.path=null", "loss.kd_ratio=0") == []


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_4_bits_are_multiplied_in_bfloat16_alone(dtype, installed):
    (problem,) = problems("teacher.quantization=int4", f"teacher.dtype={dtype}")
    assert problem == (
        f"teacher.quantization='int4': is multiplied in bfloat16, and dtype='{dtype}'; "
        "use auto, bfloat16, or int8"
    )
    for legal in ("auto", "bfloat16"):
        assert problems("teacher.quantization=int4", f"teacher.dtype={legal}") == []
    assert problems("teacher.quantization=int8", f"teacher.dtype={dtype}") == []


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_precision_that_changes_their_activations_is_refused_on_a_cpu(precision, installed):
    (problem,) = problems("teacher.quantization=int4", f"trainer.precision={precision}")
    assert problem == (
        "teacher.quantization='int4': is multiplied in bfloat16, and trainer.precision="
        f"'{precision}' computes in another dtype on a CPU; use 32-true, bf16-mixed, or int8"
    )
    assert problems("teacher.quantization=int8", f"trainer.precision={precision}") == []
    for legal in ("32-true", "bf16-mixed", "32", "bf16"):
        assert problems("teacher.quantization=int4", f"trainer.precision={legal}") == []


@with_torchao
def test_dtype_auto_is_bfloat16_for_4_bits_on_any_device(wide_dir):
    for kind, dtype in (("int4", torch.bfloat16), ("int8", torch.float32)):
        model = integers(wide_dir, kind).load(CPU, trained=False)
        assert model.get_output_embeddings().weight.dtype == dtype


def test_autocast_on_a_gpu_does_not_reach_a_teacher_on_the_cpu(installed, monkeypatch):
    monkeypatch.setattr(quantization, "_device_type", lambda accelerator: accelerator)
    config = compose("teacher.quantization=int4", "trainer.precision=16-mixed")
    for accelerator, device, expected in (
        ("cuda", "cpu", 0), ("cpu", "cpu", 1), ("cpu", None, 1), ("mps", None, 1),
    ):  # fmt: skip
        config["trainer"]["accelerator"] = accelerator
        config["teacher"]["device"] = device
        assert len(list(quantization_problems(config))) == expected, (accelerator, device)


def test_what_a_gpu_cannot_multiply_is_refused(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    (problem,) = integer_problems("int4", "bfloat16", "cuda", "bf16-mixed")
    assert problem == "needs a GPU of compute capability 8.0, this one has 7.5; use int8"
    assert list(integer_problems("int8", "float32", "cuda", "bf16-mixed")) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert list(integer_problems("int4", "auto", "cuda", "16-mixed")) == []
    (problem,) = integer_problems("int4", "auto", "mps", "32-true")
    assert problem == "has products for cpu and cuda, and 'mps' is neither; use int8"


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("key", ["trainer.strategy", "sharding"])
def test_a_quantised_teacher_is_not_sharded(key, kind, installed, monkeypatch):
    monkeypatch.setattr(quantization, "_lacking", lambda: None)
    monkeypatch.setattr(quantization, "_no_device", lambda accelerator: None)
    config = compose(f"teacher.quantization={kind}", "trainer=cpu")
    assert list(quantization_problems(config)) == []
    if key == "sharding":
        config["sharding"] = value = "teacher"
    else:
        config["trainer"]["strategy"] = value = "fsdp"
    (problem,) = quantization_problems(config)
    assert problem == (
        f"teacher.quantization='{kind}': {key}={value} shards weights in floats, not quantised "
        "ones; they are small: use trainer=ddp and sharding=null, which replicate the teacher, or "
        "teacher.quantization=null"
    )


@with_torchao
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", INTEGERS)
def test_a_gpu_gives_the_hidden_states_of_the_cpu_on_integers(kind, wide_dir):
    cuda, found = torch.device("cuda", 0), []
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    for device in (CPU, cuda):
        teacher = integers(wide_dir, kind, dtype="bfloat16").load_frozen(device).to(device)
        assert {p.device for p in teacher.parameters()} == {device}
        found.append(hidden_states(teacher.model, IDS.to(device), positions.to(device)).cpu())
    assert (found[1] - found[0]).norm() < 3e-2 * found[0].norm()
