import functools
import math

import pytest
import torch
from found_divergences import divergence_functions

from neo.losses.chunk import ChunkSums, differentiate_chunk
from neo.losses.comparisons import ByLogits
from neo.losses.distillation import Distillation
from neo.losses.divergences import (
    adaptive_kl,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from neo.losses.gradients import CLOSED_FORMS

AT_OTHER_VALUES = {
    "jsd_0.1": functools.partial(jsd, beta=0.1),
    "skew_forward_kl_0": functools.partial(skew_forward_kl, skew=0.0),
    "skew_forward_kl_0.9": functools.partial(skew_forward_kl, skew=0.9),
    "skew_reverse_kl_0": functools.partial(skew_reverse_kl, skew=0.0),
    "skew_reverse_kl_0.9": functools.partial(skew_reverse_kl, skew=0.9),
}
# A new closed form is held to its definition unasked.
DIVERGENCES = {function.__name__: function for function in CLOSED_FORMS} | AT_OTHER_VALUES
TOKENS, VOCAB = 6, 211

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
each_temperature = pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 2.0, 8.0])


def logits(kind, tokens=TOKENS):
    """Student and teacher in float64 that are exact in float32."""
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, tokens, VOCAB, generator=generator)
    if kind == "wide":
        s, t = 5 * s, 5 * t
    elif kind == "far from 0":
        s, t = s + 80, t - 80
    elif kind == "of +-80":
        s, t = s + 80 * s.sign(), t + 80 * t.sign()
    elif kind == "one-hot teacher":
        t = torch.full_like(t, -80.0)
        t[:, 3] = 80
    elif kind == "one-hot teacher by bias":
        t = torch.full_like(t, -math.inf)
        t[:, 3] = 0
    return s.double(), t.double()


def chunked(divergence, s, t, temperature):
    """Value and gradient of every token, in the dtype of the logits."""
    spec = Distillation(divergence=divergence, kd_ratio=1.0, temperature=temperature)
    gradient, values = s.clone(), []
    for token in range(len(s)):
        row = slice(token, token + 1)
        sums = ChunkSums(s.dtype, s.device)
        differentiate_chunk(
            gradient[row],
            ByLogits(t[row]),
            torch.zeros(1, dtype=torch.int64),
            spec,
            sums,
            gradient=True,
        )
        values.append(sums.kd)
    return torch.stack(values), gradient


def defined(divergence, s, t, temperature):
    """The same by autograd, from the definition."""
    s = s.clone().requires_grad_()
    values = divergence(s, t, temperature=temperature)
    return values.detach(), torch.autograd.grad(values.sum(), s)[0]


def test_every_shipped_divergence_has_a_closed_form_and_every_closed_form_a_definition():
    defined = divergence_functions()
    shipped = {f for f in defined.values() if f.__module__ == "neo.losses.divergences"}
    assert shipped <= set(CLOSED_FORMS) <= set(defined.values())


@each_divergence
@each_temperature
@pytest.mark.parametrize(
    "kind", ["of unit size", "wide", "far from 0", "of +-80", "one-hot teacher"]
)
def test_in_float32_value_and_gradient_are_within_1e_5_of_the_definition_in_float64(
    divergence, temperature, kind
):
    s, t = logits(kind)
    values, gradient = chunked(divergence, s.float(), t.float(), temperature)
    expected, slope = defined(divergence, s, t, temperature)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-12)
    # Where a divergence has no slope left (a student sure of another id), its terms still have
    # their size, T times q times the divergence, and rounding is relative to that.
    terms = expected / temperature * (s / temperature).softmax(-1).norm(dim=-1)
    error = (gradient.double() - slope).norm(dim=-1)
    assert (error <= 1e-5 * torch.maximum(slope.norm(dim=-1), terms)).all()


@each_divergence
@each_temperature
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_between_equals_value_and_gradient_are_0(divergence, temperature, dtype):
    s, _ = logits("wide")
    values, gradient = chunked(divergence, s.to(dtype), s.to(dtype), temperature)
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-30)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)


@each_divergence
@each_temperature
@pytest.mark.parametrize("size", [1e-1, 1e-2])
def test_the_value_between_models_that_almost_agree_is_not_drowned_by_rounding(
    divergence, temperature, size
):
    s, gap = (x.float() for x in logits("of unit size"))
    t = s + size * gap
    values, _ = chunked(divergence, s, t, temperature)
    expected, _ = defined(divergence, s.double(), t.double(), temperature)
    torch.testing.assert_close(values.double(), expected, rtol=1e-3, atol=0)


@each_divergence
@each_temperature
def test_in_float64_value_and_gradient_are_those_of_the_definition(divergence, temperature):
    s, t = logits("wide")
    actual = chunked(divergence, s, t, temperature)
    expected = defined(divergence, s, t, temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# the weights of adaptive_kl are constants for the gradient, which differences do not know
@pytest.mark.parametrize("divergence", [f for f in DIVERGENCES.values() if f is not adaptive_kl])
def test_gradients_are_those_of_finite_differences(divergence):
    s, t = (x[:2, :7].clone() for x in logits("of unit size"))
    step = 1e-6
    _, gradient = chunked(divergence, s, t, 2.0)
    for index in range(s.shape[1]):
        shift = torch.zeros_like(s)
        shift[:, index] = step
        up, down = (chunked(divergence, x, t, 2.0)[0] for x in (s + shift, s - shift))
        torch.testing.assert_close(
            gradient[:, index], (up - down) / (2 * step), rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize(
    "divergence",
    [forward_kl, jsd, skew_forward_kl, skew_reverse_kl, total_variation],
)
@each_temperature
def test_a_teacher_that_rules_ids_out_gives_no_nan(divergence, temperature):
    s, t = logits("one-hot teacher by bias")
    values, gradient = chunked(divergence, s.float(), t.float(), temperature)
    expected, slope = defined(divergence, s, t, temperature)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-5)


@each_divergence
def test_a_student_that_has_become_nan_gives_nan_and_not_a_number(divergence):
    s, t = (x.float() for x in logits("of unit size"))
    s[0, 5] = math.nan
    values, gradient = chunked(divergence, s, t, 1.0)
    assert values.isnan().tolist() == [True] + [False] * (TOKENS - 1)
    assert gradient.isnan().any(-1).tolist() == [True] + [False] * (TOKENS - 1)


@pytest.mark.parametrize("finite", [True, False])
def test_reverse_kl_is_infinite_where_the_student_likes_an_id_that_is_ruled_out(finite):
    s, t = logits("of unit size")
    t[:, 7] = -math.inf
    if finite:
        s[:, 7] = -1e4  # its probability underflows
    values, _ = chunked(reverse_kl, s.float(), t.float(), 1.0)
    assert values.isfinite().all() if finite else values.isposinf().all()
