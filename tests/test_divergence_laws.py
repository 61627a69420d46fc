"""Laws of every divergence, found in neo/losses and conf/loss: a new one is held to them unasked.

What holds of the shipped ones besides (published definitions, bounds, rounding) stands in
test_divergences.py and test_gradients.py; that the fused loss gives their
numbers, in test_fused.py.
"""

import functools
import inspect

import pytest
import torch
from found_divergences import (
    AT_OTHER_VALUES,
    all_divergences,
    chosen_divergences,
    divergence_functions,
    function_of,
)
from lab import compose

import neo.losses
from neo.config import build, validate
from neo.losses.divergences import adaptive_kl

DIVERGENCES = all_divergences() | AT_OTHER_VALUES
TEMPERATURES = [0.25, 1.0, 8.0]
# Their gradient is not that of their value: it holds a part of it constant, as they say.
HOLD_WEIGHTS_CONSTANT = (adaptive_kl,)

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
each_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def logits(tokens=6, vocab=9, spread=2.0, seed=0):
    """Student and teacher in float64, from models that are near to ones that are far and sure."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.linspace(0.1, spread, tokens, dtype=torch.float64).unsqueeze(-1)
    return size * torch.randn(2, tokens, vocab, generator=generator, dtype=torch.float64)


def value_and_gradient(divergence, student, teacher, temperature):
    leaf = student.clone().requires_grad_()
    values = divergence(leaf, teacher, temperature=temperature)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def law_of_the_signature(divergence):
    parameters = inspect.signature(function_of(divergence)).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["student_logits", "teacher_logits"]
    assert parameters["temperature"].default == 1.0
    assert all(p.default is not p.empty for name, p in parameters.items() if name not in positional)


def law_of_zero(divergence, temperature=1.0):
    student, _ = logits(spread=6.0)
    value, gradient = value_and_gradient(divergence, student, student.clone(), temperature)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)


def law_of_size(divergence, temperature=1.0):
    """Above 0 between models that differ, however much they do; by rounding at most below it."""
    for seed in range(8):
        values = divergence(*logits(spread=1 + 2.0 * seed, seed=seed), temperature=temperature)
        assert (values > 1e-6).all()
    near, _ = logits()
    assert (divergence(near, near + 1e-9 * near.sin(), temperature=temperature) >= -1e-12).all()


def law_of_constants(divergence, temperature=1.0):
    student, teacher = logits()
    torch.testing.assert_close(
        divergence(student - 31, teacher + 17, temperature=temperature),
        divergence(student, teacher, temperature=temperature),
        rtol=1e-7, atol=1e-9,
    )  # fmt: skip


def law_of_tokens(divergence, temperature=1.0):
    student, teacher = logits()
    alone = [
        divergence(s[None], t[None], temperature=temperature)
        for s, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(
        divergence(student, teacher, temperature=temperature), torch.cat(alone)
    )


def law_of_the_gradient(divergence, temperature=1.0):
    if function_of(divergence) in HOLD_WEIGHTS_CONSTANT:
        return
    student, teacher = logits(tokens=3, vocab=5)
    assert torch.autograd.gradcheck(
        lambda s: divergence(s, teacher, temperature=temperature),
        student.requires_grad_(),
        raise_exception=False,
    )


def law_of_sure_models(divergence, temperature=1.0):
    """Logits of 80, as trained models have them, in float32."""
    student = torch.tensor([[80.0, -80.0, 0.0], [-80.0, 80.0, 80.0], [0.0, 0.1, 0.0]])
    teacher = torch.tensor([[-80.0, 80.0, 0.0], [-80.0, 80.0, 80.0], [80.0, -80.0, -80.0]])
    value, gradient = value_and_gradient(divergence, student, teacher, temperature)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    exact, _ = value_and_gradient(divergence, student.double(), teacher.double(), temperature)
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)


def law_of_dtypes(divergence):
    student, teacher = logits(vocab=50)
    assert divergence(student, teacher.float()).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        s, t = student.to(dtype), teacher.to(dtype)
        torch.testing.assert_close(divergence(s, t), divergence(s.float(), t.float()))


def law_of_the_temperature(divergence):
    """With its square a divergence tends to one squared error of logits, or says it does not."""
    student, teacher = logits()
    variance = (teacher - student).var(-1, correction=0)
    low, high = (divergence(student, teacher, temperature=t) / variance for t in (1e3, 1e4))
    if "Large T: no limit" in (function_of(divergence).__doc__ or ""):
        assert (high > 2 * low).all()
        return
    torch.testing.assert_close(high, low, rtol=2e-2, atol=0)
    torch.testing.assert_close(high, high.mean().expand_as(high), rtol=2e-3, atol=0)


AT_ANY_TEMPERATURE = [
    law_of_zero,
    law_of_size,
    law_of_constants,
    law_of_tokens,
    law_of_the_gradient,
    law_of_sure_models,
]
BESIDES = [law_of_the_signature, law_of_dtypes, law_of_the_temperature]


def name_of(law):
    return law.__name__.removeprefix("law_of_")


@each_divergence
@each_temperature
@pytest.mark.parametrize("law", AT_ANY_TEMPERATURE, ids=name_of)
def test_a_divergence_keeps_the_law_of(law, divergence, temperature):
    law(divergence, temperature)


@each_divergence
@pytest.mark.parametrize("law", BESIDES, ids=name_of)
def test_a_divergence_keeps_the_law_of_all_temperatures_and_dtypes(law, divergence):
    law(divergence)


def test_what_a_file_of_conf_loss_names_is_found():
    functions = divergence_functions().values()
    assert all(function_of(d) in functions for d in chosen_divergences().values())


def hellinger(student_logits, teacher_logits, *, temperature=1.0):
    """Right; each of the wrong ones below breaks one thing of it."""
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    q, p = ((x.to(dtype) / temperature).log_softmax(-1) for x in (student_logits, teacher_logits))
    return temperature**2 * 0.5 * ((q / 2).exp() - (p / 2).exp()).square().sum(-1)


def of(change):
    """`hellinger` whose value is changed."""

    def wrong(student_logits, teacher_logits, *, temperature=1.0):
        value = hellinger(student_logits, teacher_logits, temperature=temperature)
        return change(value, student_logits, teacher_logits, temperature)

    return wrong


def of_one_model(student_logits, teacher_logits, temperature=1.0):
    return hellinger(student_logits, teacher_logits, temperature=temperature)


def in_logits_dtype(student_logits, teacher_logits, *, temperature=1.0):
    q, p = ((x / temperature).softmax(-1) for x in (student_logits, teacher_logits))
    return temperature**2 * 0.5 * (q - p).square().sum(-1)


WRONG = {
    "negative": (law_of_size, of(lambda v, s, t, T: -v)),
    "not 0 between equals": (law_of_zero, of(lambda v, s, t, T: v + 1e-6)),
    "a slope between equals": (law_of_zero, of(lambda v, s, t, T: v + 1e-3 * (s - t).sum(-1))),
    "of logits": (law_of_constants, of(lambda v, s, t, T: v + 1e-3 * (s - t).square().sum(-1))),
    "mean over tokens": (law_of_tokens, of(lambda v, s, t, T: v.mean().expand_as(v))),
    "detached": (law_of_the_gradient, of(lambda v, s, t, T: v + (v * v).detach())),
    "overflows": (law_of_sure_models, of(lambda v, s, t, T: v + 0 * s.square().exp().sum(-1))),
    "in half precision": (law_of_dtypes, in_logits_dtype),
    "without the square": (law_of_the_temperature, of(lambda v, s, t, T: v / T**2)),
    "positional temperature": (law_of_the_signature, of_one_model),
}


@pytest.mark.parametrize("law", [*AT_ANY_TEMPERATURE, *BESIDES], ids=name_of)
def test_a_right_divergence_of_ones_own_keeps_every_law(law):
    law(hellinger)


@pytest.mark.parametrize(("law", "wrong"), WRONG.values(), ids=WRONG)
def test_every_law_sees_a_wrong_divergence(law, wrong):
    with pytest.raises(AssertionError):
        law(wrong)


def test_a_file_of_ones_own_is_found_and_can_be_named_in_a_config(tmp_path, monkeypatch):
    source = "import torch\n" + inspect.getsource(hellinger)
    (tmp_path / "divergences_hellinger.py").write_text(source)
    monkeypatch.setattr(neo.losses, "__path__", [*neo.losses.__path__, str(tmp_path)])
    found = divergence_functions()["hellinger"]
    assert found.__module__ == "neo.losses.divergences_hellinger"
    config = compose("loss.divergence._target_=neo.losses.divergences_hellinger.hellinger")
    validate(config)
    chosen = build(config["loss"]).divergence
    assert isinstance(chosen, functools.partial)
    assert chosen.func is found
