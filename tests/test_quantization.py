import dataclasses
from importlib.util import find_spec

import pytest
import torch
from fits import whole_and_cut
from lab import FAMILIES, compose, tiny_model
from torch import nn

from neo.config import validate
from neo.models import causal_lm, quantization
from neo.models.causal_lm import CausalLM
from neo.models.hidden import hidden_states
from neo.models.quantization import dequantized, quantization_problems
from neo.models.start import attach_branch
from neo.models.student import build_student, logits_on, trained_parameters
from neo.models.variants import lora, lora_fa, moslora
from neo.teachers.online import OnlineTeacher

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 4], [11, 12, 13, 2, 1, 40, 41]])
KEYS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
# bitsandbytes has kernels for a CPU: all but speed and memory is tested there.
with_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs pip install 'llm-neo[quant]'"
)


@pytest.fixture
def on_cuda(monkeypatch):
    """As on a machine with a GPU and bitsandbytes."""
    monkeypatch.setattr(quantization, "_no_device", lambda accelerator: None)
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda version: True)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """A model whose rows are whole blocks of 64: others a CPU multiplies wrongly."""
    return tiny_model(tmp_path_factory.mktemp("models") / "base", hidden=64, seed=1)


def nf4(folder, **keys):
    return CausalLM(path=str(folder), quantization="nf4", **keys)


def problems(*overrides):
    config = compose("trainer=auto", *overrides)
    validate(config)
    return list(quantization_problems(config))


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def gradients(student):
    student(IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in trained_parameters(student).items()}


def test_qlora_is_lora_on_a_base_in_nf4():
    qlora, plain = compose("lora=qlora"), compose("lora=lora")
    assert qlora["lora"] == plain["lora"]
    assert qlora["student"] == plain["student"] | {"quantization": "nf4"}
    assert qlora["teacher"] == plain["teacher"]


def test_without_quantization_nothing_is_asked_for():
    assert problems("trainer.accelerator=cpu") == []


def test_qlora_has_no_problem_where_all_it_needs_is_there(on_cuda):
    assert problems("lora=qlora", "teacher.quantization=fp4") == []


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_4_bit_model_needs_a_cuda_device(role, monkeypatch):
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda version: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = compose(f"{role}.quantization=nf4")
    for accelerator, why in (("cpu", "that is none"), ("auto", "this machine has none")):
        config["trainer"]["accelerator"] = accelerator
        (problem,) = quantization_problems(config)
        assert problem == (
            f"{role}.quantization='nf4': needs a CUDA device, and with trainer.accelerator="
            f"'{accelerator}' {why}; use trainer=gpu on a machine with one, or quantization=null"
        )


def test_a_cpu_is_no_cuda_device_where_there_is_one(monkeypatch):
    config = compose("student.quantization=nf4", "trainer=cpu")
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda version: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len(list(quantization_problems(config))) == 1
    config["trainer"]["accelerator"] = "gpu"
    assert list(quantization_problems(config)) == []


def test_a_missing_bitsandbytes_is_named_with_what_installs_it(on_cuda, student_dir, monkeypatch):
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda version: False)
    (problem,) = problems("lora=qlora")
    assert problem.startswith("student.quantization='nf4': needs bitsandbytes, version 0.50")
    assert problem.endswith("pip install 'llm-neo[quant]'")
    with pytest.raises(ValueError, match=r"quantization='nf4': needs bitsandbytes.*neo\[quant\]"):
        nf4(student_dir).load(CPU, trained=False)


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_4_bit_weights_are_not_trained(method, on_cuda, student_dir):
    (problem,) = problems(f"method={method}", "student.quantization=nf4")
    assert problem.startswith("student.quantization='nf4': lora=none trains all weights")
    assert problems(f"method={method}", "teacher.quantization=nf4") == []
    with pytest.raises(ValueError, match="quantization='nf4': 4-bit weights are frozen"):
        nf4(student_dir).load(CPU, trained=True)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq",
                                   "mica", "orthogonal", "eva"])  # fmt: skip
def test_a_start_that_needs_the_weights_in_full_is_refused(start, on_cuda):
    config = compose("lora=qlora", "trainer=auto", f"lora.init_lora_weights={start}")
    (problem,) = quantization_problems(config)
    assert problem.startswith(f"student.quantization='nf4': lora.init_lora_weights='{start}'")
    assert "use true or gaussian" in problem


def test_a_variant_that_cuts_its_base_is_refused(on_cuda):
    (problem,) = problems("lora=kasa", "student.quantization=nf4")
    assert problem.startswith("student.quantization='nf4': lora=kasa cuts its base")


@pytest.mark.parametrize("start", ["true", "gaussian"])
def test_a_start_that_is_drawn_is_not_refused(start, on_cuda):
    assert problems("lora=qlora", f"lora.init_lora_weights={start}") == []


@pytest.mark.parametrize(
    ("dtype", "precision", "legal"),
    [
        ("auto", "bf16-true", "32-true or bf16-mixed"),
        ("bfloat16", "16-mixed", "32-true or bf16-mixed"),
        ("float16", "bf16-mixed", "32-true or 16-mixed"),
        ("float32", "64-true", "32-true or bf16-mixed or 16-mixed"),
    ],
)
def test_a_precision_that_is_not_the_bases_is_refused(dtype, precision, legal, on_cuda):
    settings = ["lora=qlora", f"student.dtype={dtype}"]
    (problem,) = problems(*settings, f"trainer.precision={precision}")
    assert problem == (
        f"student.quantization='nf4': trainer.precision='{precision}' does not go with "
        f"student.dtype='{dtype}' and a float32 branch; use {legal}"
    )
    for name in legal.split(" or "):
        assert problems(*settings, f"trainer.precision={name}") == []


@pytest.mark.parametrize("precision", [None, 32, "32", "bf16"])
def test_lightnings_other_names_of_a_precision_are_known(precision, on_cuda):
    config = compose("lora=qlora")
    config["trainer"]["precision"] = precision
    assert list(quantization_problems(config)) == []


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [("trainer", None, "gpu"), ("student", "quantization", "int3"), ("student", "dtype", ["a"])],
)
def test_what_is_wrong_in_a_group_alone_is_left_to_the_group(group, key, value, on_cuda):
    config = compose("lora=qlora", "trainer=auto")
    if key is None:
        config[group] = value
    else:
        config[group][key] = value
    assert list(quantization_problems(config)) == []


def test_problems_of_both_models_come_together(monkeypatch):
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda version: False)
    found = problems("lora=qlora", "trainer.accelerator=cpu", "teacher.quantization=nf4",
                     "lora.init_lora_weights=pissa", "trainer.precision=bf16-true")  # fmt: skip
    assert [problem.split(":")[0].split(".")[0] for problem in found] == 4 * ["student"] + 2 * [
        "teacher"
    ]


def test_transformers_is_asked_for_4_bits_on_the_device(on_cuda, student_dir, monkeypatch):
    asked = {}

    def record(location, **keys):
        asked.update(keys)
        raise OSError("enough")

    monkeypatch.setattr(causal_lm.AutoModelForCausalLM, "from_pretrained", record)
    with pytest.raises(ValueError, match="enough"):
        nf4(student_dir, dtype="bfloat16").load(torch.device("cuda", 1), trained=False)
    assert asked["device_map"] == {"": torch.device("cuda", 1)}
    assert asked["dtype"] == torch.bfloat16
    assert asked["use_safetensors"]
    config = asked["quantization_config"].to_dict()
    assert config["load_in_4bit"]
    assert config["bnb_4bit_quant_type"] == "nf4"
    assert config["bnb_4bit_use_double_quant"]
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"
    assert not config["llm_int8_skip_modules"]  # transformers' own choice: the head


@with_bitsandbytes
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_the_head_is_in_4_bits(family, tie, tmp_path):
    folder = tiny_model(tmp_path, family=family, tie=tie)
    spec = nf4(folder, dtype="bfloat16")
    model = spec.load(CPU, trained=False)
    layers = linear_layers(model)
    head = layers.pop("lm_head")
    assert head.weight.dtype == torch.bfloat16
    assert (head.weight is model.get_input_embeddings().weight) == tie
    assert len(layers) == 14
    for layer in layers.values():
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.bfloat16
    others = {p.dtype for p in model.parameters()} - {torch.uint8}
    assert others == {torch.bfloat16}


@with_bitsandbytes
@pytest.mark.parametrize("kind", quantization.KINDS)
def test_a_4_bit_model_says_what_its_dequantized_weights_say(kind, base_dir):
    spec = CausalLM(path=str(base_dir), quantization=kind)
    model = spec.load(CPU, trained=False)
    said = logits_on(model, IDS)
    torch.testing.assert_close(logits_on(model.train(), IDS), said)
    whole = dequantized(spec.load(CPU, trained=False))
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    torch.testing.assert_close(logits_on(whole, IDS), said, rtol=1e-4, atol=1e-4)
    full = dataclasses.replace(spec, quantization=None).load(CPU, trained=False)
    assert (logits_on(full, IDS) - said).abs().max() > 0.1


@with_bitsandbytes
@pytest.mark.parametrize("kind", quantization.KINDS)
@pytest.mark.parametrize("hidden", [32, 48, 64])
def test_dequantized_weights_are_near_those_quantised_whatever_the_shape(hidden, kind, tmp_path):
    spec = CausalLM(path=str(tiny_model(tmp_path, hidden=hidden)), quantization=kind)
    whole = dequantized(spec.load(CPU, trained=False))
    full = dataclasses.replace(spec, quantization=None).load(CPU, trained=False)
    for name, layer in linear_layers(full).items():
        off = (whole.get_submodule(name).weight - layer.weight).norm() / layer.weight.norm()
        assert off == 0 if name == "lm_head" else 0.05 < off < 0.15, name


@with_bitsandbytes
@pytest.mark.parametrize("variant", [
    lora(**KEYS), lora(use_dora=True, **KEYS), lora(use_rslora=True, **KEYS), moslora(**KEYS),
    lora_fa(**KEYS),
], ids=["lora", "dora", "rslora", "moslora", "lora_fa"])  # fmt: skip
def test_a_branch_on_4_bits_learns_as_on_the_dequantized_base(variant, base_dir):
    spec = nf4(base_dir)
    untouched = logits_on(spec.load(CPU, trained=False), IDS)
    student = build_student(spec, variant, CPU, 0)
    torch.testing.assert_close(logits_on(student, IDS), untouched, rtol=0, atol=1e-5)
    oracle = attach_branch(dequantized(spec.load(CPU, trained=False)), variant, 0)
    for model in (student, oracle):
        with torch.no_grad():
            for name, weight in trained_parameters(model).items():
                if "lora_B" in name:  # zero, and then A has no gradient
                    weight.copy_(torch.sin(torch.arange(weight.numel())).view_as(weight) / 10)
    assert all("lora_" in name for name in trained_parameters(student))
    actual, expected = gradients(student), gradients(oracle)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@with_bitsandbytes
def test_recomputing_activations_changes_no_gradient_on_4_bits(base_dir):
    found = [
        gradients(build_student(spec, lora(**KEYS), CPU, 0))
        for spec in (nf4(base_dir), nf4(base_dir, activation_checkpointing=True))
    ]
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@with_bitsandbytes
def test_the_branch_is_trained_in_float32_on_a_base_in_bfloat16(base_dir):
    student = build_student(nf4(base_dir, dtype="bfloat16"), lora(**KEYS), CPU, 0)
    assert {p.dtype for p in trained_parameters(student).values()} == {torch.float32}
    assert all(g.abs().sum() > 0 for n, g in gradients(student).items() if "lora_B" in n)


@with_bitsandbytes
def test_a_teacher_may_be_in_4_bits(base_dir):
    spec = OnlineTeacher(path=str(base_dir), quantization="nf4")
    teacher = spec.load_frozen(CPU)
    assert not any(p.requires_grad for p in teacher.parameters())
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    expected = hidden_states(dequantized(spec.load(CPU, trained=False)), IDS, positions)
    actual = hidden_states(teacher.model, IDS, positions)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@with_bitsandbytes
def test_a_stopped_run_of_qlora_ends_as_if_it_had_never_stopped(
    on_cuda, student_dir, teacher_dir, tmp_path
):
    settings = [
        "lora=qlora", "teacher.quantization=nf4", "trainer.max_steps=4", "trainer.max_epochs=-1",
        "data.batch_size=2", "optim.lr=0.01", "checkpoint_every_n_steps=2", "data.packing=false",
    ]  # fmt: skip
    expected, actual = whole_and_cut(student_dir, teacher_dir, tmp_path, *settings)
    assert expected.keys() == actual.keys()
    for parameter, value in expected.items():
        torch.testing.assert_close(actual[parameter], value, rtol=0, atol=0)


@with_bitsandbytes
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_gives_the_logits_and_gradients_of_the_cpu_on_4_bits(dtype, base_dir):
    cuda, found = torch.device("cuda", 0), []
    for device in (CPU, cuda):
        student = build_student(nf4(base_dir, dtype=dtype), lora(**KEYS), device, 0).to(device)
        assert {p.device for p in student.parameters()} == {device}
        student(IDS.to(device), labels=IDS.to(device)).loss.backward()
        grads = {n: p.grad.cpu() for n, p in trained_parameters(student).items()}
        found.append((logits_on(student, IDS), grads))
    (logits, expected), (on_gpu, actual) = found
    share = 1e-3 if dtype == "float32" else 5e-2
    assert (on_gpu - logits).abs().max() < share * logits.abs().max()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 2 * share * gradient.norm() + 1e-6, name
