import gc

import pytest
import torch
from lab import compose, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from neo.config import build, conf_dir
from neo.models.causal_lm import CausalLM
from neo.models.memory import (
    StepCounter,
    make_fake,
    quantized_bytes,
    quantized_weights,
    weight_bytes,
    weight_dtype,
)
from neo.models.student import build_meta_student, build_student, inner
from neo.models.variants import lora, none

VARIANTS = sorted(path.stem for path in (conf_dir() / "lora").glob("*.yaml"))
CPU = torch.device("cpu")


def counting(num_chosen=1, number=1.0):
    return StepCounter(num_chosen, number)


def test_what_is_alive_is_counted_by_part_and_struck_out_when_it_is_gone():
    with FakeTensorMode(), counting() as counter:
        with counter.counting("a"):
            first = torch.empty(10)
            view = first.view(2, 5).T  # no memory of its own
        with counter.counting("b"):
            second = first + 1
        assert (counter.live["a"], counter.live["b"]) == (40, 40)
        del second, first
        assert (counter.live["a"], counter.live["b"]) == (40, 0)
        del view
        assert counter.live["a"] == 0


def test_a_phase_keeps_what_it_held_when_it_held_most():
    with FakeTensorMode(), counting() as counter, counter.counting("a"):
        kept = torch.empty(10)
        with counter.counting("b", "one"):
            kept.exp().exp().exp()  # two at a time
        with counter.counting("c", "two"):
            kept.clone()
    assert counter.peaks["one"] == {"a": 40, "b": 80}
    assert counter.peaks["two"] == {"a": 40, "c": 40}


def test_a_result_that_becomes_something_else_moves_there():
    with FakeTensorMode(), counting() as counter:
        with counter.counting("a"):
            tensor = torch.empty(10)
        counter.move(tensor, "b")
        assert (counter.live["a"], counter.live["b"]) == (0, 40)
        del tensor
        assert counter.live["b"] == 0


def test_a_boolean_index_chooses_as_many_as_was_said_and_a_number_is_the_one_given():
    with FakeTensorMode(), counting(num_chosen=3, number=0.5):
        hidden = torch.empty(4, 5, 6, requires_grad=True)
        chosen = hidden[torch.empty(4, 5, dtype=torch.bool)]
        assert chosen.shape == (3, 6)
        chosen.sum().backward()
        assert hidden.grad.shape == hidden.shape
        assert torch.empty(()).item() == 0.5


@pytest.mark.parametrize("autocast", [False, True])
def test_products_and_attention_are_counted_forward_and_backward(autocast):
    q, w = (2, 4, 16, 8), (32, 32)
    with FakeTensorMode(), counting() as counter, torch.autocast("cpu", enabled=autocast):
        x = torch.empty(q, requires_grad=True)
        weight = torch.empty(w)  # frozen
        with counter.counting("a", "attention"):
            y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        with counter.counting("a", "product"):
            z = nn.functional.linear(y.transpose(1, 2).reshape(32, 32), weight)
        with counter.counting("a", "backward"):
            z.sum().backward()
    attention = 2 * (2 * 2 * 4 * 16 * 16 * 8)  # QK' and PV
    product = 2 * 32 * 32 * 32
    assert counter.flops["attention"] == attention
    assert counter.flops["product"] == product
    # no gradient of the frozen weight; in attention QK' is computed again
    assert counter.flops["backward"] == product + 5 * attention // 2


def test_fast_products_of_frozen_layers_count_like_any():
    from neo.losses.products import by_onednn, times_transposed

    with FakeTensorMode(), counting() as counter:
        a, b = torch.empty(256, 512), torch.empty(128, 512)
        assert by_onednn(a, b)
        times_transposed(a, b)
    assert counter.flops["begin"] == 2 * 256 * 512 * 128


def test_fake_weights_stay_tied_and_take_the_dtypes_they_are_given(tmp_path):
    folder = tiny_model(tmp_path, tie=True)
    model = CausalLM(path=str(folder)).meta().requires_grad_(False)
    names = {name: p.shape for name, p in model.named_parameters()}
    with FakeTensorMode(), counting() as counter:
        make_fake(model, lambda name, weight: torch.bfloat16)
        assert {name: p.shape for name, p in model.named_parameters()} == names
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad or p.is_meta for p in model.parameters())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        assert counter.live["other"] == 2 * sum(map(torch.Size.numel, names.values())) + buffers


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("eva", "corda", "loraga")])
def test_weights_are_planned_in_the_dtypes_in_which_a_run_holds_them(variant, student_dir):
    spec = CausalLM(path=str(student_dir), dtype="bfloat16")
    node = compose(f"lora={variant}", *["method=kd"] * (variant == "none"))["lora"]
    branch = build(node | ({} if variant == "none" else {"r": 4}))
    student = build_student(spec, branch, CPU, 0)
    real = {n: p.numel() * p.element_size() for n, p in student.named_parameters()}
    meta = build_meta_student(spec, branch)
    assert weight_bytes(meta, torch.bfloat16) == real
    for name, weight in student.named_parameters():
        assert weight_dtype(name, weight, torch.bfloat16) == weight.dtype, name


def test_quantised_are_linear_layers_but_the_head_and_what_is_trained(student_dir):
    spec = CausalLM(path=str(student_dir))
    student = build_meta_student(spec, lora(r=2, target_modules="all-linear"))
    names = set(quantized_weights(inner(student)))
    assert len(names) == 14
    assert all(name.endswith("proj.base_layer.weight") for name in names)
    assert quantized_weights(build_meta_student(CausalLM(path=str(student_dir)), none())) == {}


def test_quantised_weights_are_as_small_as_their_bits_and_constants():
    weight = torch.empty(256, 1024, device="meta")
    num = weight.numel()
    assert quantized_bytes("nf4", weight) == num / 2 + num / 64 + 4 * num / (64 * 256)
    assert quantized_bytes("int8", weight) == num + 5 * 256
    assert quantized_bytes("int4", weight, 128) == num / 2 + 4 * num / 128


def test_saved_for_backward_is_counted_as_autograd_saves_it():
    # the same layers with data, their storages noted as autograd asks to keep them
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({id(t): t}) or t, lambda t: t
    ):
        loss = layers(x).square().sum()
    weights = {p.untyped_storage().data_ptr() for p in layers.parameters()}
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved.values()
    }
    kept = sum(size for key, size in storages.items() if key not in weights)
    with FakeTensorMode(), counting() as counter:
        fake = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).requires_grad_(False)
        y = torch.empty(5, 8, requires_grad=True)
        with counter.counting("activations"):
            planned = fake(y).square().sum()
        gc.collect()
        assert counter.live["activations"] == kept + planned.nbytes
    assert kept == loss.nbytes * (5 * 16 + 5 * 4)
