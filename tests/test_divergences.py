import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.losses.divergences import cross_entropy, forward_kl, jsd, reverse_kl

DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "jsd_0.1": functools.partial(jsd, beta=0.1),
    "jsd_0.9": functools.partial(jsd, beta=0.9),
}
TEMPERATURES = [0.25, 1.0, 2.0, 8.0]

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
each_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)
logit_rows = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.tuples(st.just(seed), st.integers(1, 5), st.integers(2, 9), st.floats(0, 12))
)


def random_logits(seed, tokens, vocab, spread, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(2, tokens, vocab, generator=generator, dtype=dtype)


@each_divergence
@each_temperature
@given(shape=logit_rows)
@settings(max_examples=8, deadline=None)
def test_a_divergence_is_zero_between_equals(divergence, temperature, shape):
    student, _ = random_logits(*shape)
    torch.testing.assert_close(
        divergence(student, student.clone(), temperature=temperature),
        torch.zeros(len(student), dtype=torch.float64),
    )


@each_divergence
@each_temperature
@given(shape=logit_rows)
@settings(max_examples=8, deadline=None)
def test_a_divergence_is_never_negative(divergence, temperature, shape):
    student, teacher = random_logits(*shape)
    values = divergence(student, teacher, temperature=temperature)
    # A sum of terms of both signs may end one rounding below 0.
    assert (values >= -1e-12 * temperature**2).all()


@each_divergence
@each_temperature
def test_a_divergence_tells_unequal_models_apart(divergence, temperature):
    student, teacher = random_logits(0, 4, 7, 1.0)
    assert (divergence(student, teacher, temperature=temperature) > 1e-4).all()


@each_divergence
@each_temperature
@given(shape=logit_rows, a=st.floats(-50, 50), b=st.floats(-50, 50))
@settings(max_examples=8, deadline=None)
def test_a_divergence_is_blind_to_constants_added_to_logits(divergence, temperature, shape, a, b):
    student, teacher = random_logits(*shape)
    torch.testing.assert_close(
        divergence(student + a, teacher + b, temperature=temperature),
        divergence(student, teacher, temperature=temperature),
        rtol=1e-7,
        atol=1e-9,
    )


@each_temperature
def test_both_kls_equal_those_of_torch(temperature):
    student, teacher = random_logits(1, 6, 11, 3.0)
    log_q = F.log_softmax(student / temperature, -1)
    log_p = F.log_softmax(teacher / temperature, -1)
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1) * temperature**2
    torch.testing.assert_close(forward_kl(student, teacher, temperature=temperature), forward)
    torch.testing.assert_close(reverse_kl(student, teacher, temperature=temperature), reverse)


@each_temperature
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_equals_two_kls_to_the_mixture(temperature, beta):
    student, teacher = random_logits(2, 6, 11, 3.0)
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    log_m = (beta * p + (1 - beta) * q).log()
    to_mixture = [F.kl_div(log_m, x, reduction="none").sum(-1) for x in (p, q)]
    expected = temperature**2 * (beta * to_mixture[0] + (1 - beta) * to_mixture[1])
    actual = jsd(student, teacher, temperature=temperature, beta=beta)
    torch.testing.assert_close(actual, expected)


def test_jsd_over_beta_tends_to_forward_kl_at_0_and_reverse_kl_at_1():
    student, teacher = random_logits(3, 5, 9, 1.0)
    small = 1e-7
    near_0 = jsd(student, teacher, beta=small) / small
    near_1 = jsd(student, teacher, beta=1 - small) / small
    torch.testing.assert_close(near_0, forward_kl(student, teacher), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(near_1, reverse_kl(student, teacher), rtol=1e-5, atol=1e-6)


def test_jsd_at_one_half_is_symmetric_and_at_most_log_2():
    student, teacher = random_logits(4, 50, 9, 8.0)
    values = jsd(student, teacher)
    torch.testing.assert_close(values, jsd(teacher, student))
    assert (values <= math.log(2)).all()


@each_divergence
@each_temperature
def test_the_gradient_of_a_divergence_is_that_of_finite_differences(divergence, temperature):
    student, teacher = random_logits(5, 3, 5, 2.0)
    assert torch.autograd.gradcheck(
        lambda s: divergence(s, teacher, temperature=temperature), student.requires_grad_()
    )


@each_divergence
@each_temperature
def test_logits_of_80_give_finite_values_and_gradients(divergence, temperature):
    student = torch.tensor([[80.0, -80.0, 0.0], [-80.0, 80.0, 80.0]], requires_grad=True)
    teacher = torch.tensor([[-80.0, 80.0, 0.0], [-80.0, 80.0, 80.0]])
    values = divergence(student, teacher, temperature=temperature)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert values[0] > 0.01
    assert values[1] == 0


@pytest.mark.parametrize("divergence", [forward_kl, jsd])
def test_ids_that_the_teacher_rules_out_give_no_nan(divergence):
    one_hot = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=torch.float64)
    student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    value = divergence(student, one_hot)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    nearly = torch.tensor([[0.0, -500.0, -500.0]], dtype=torch.float64)
    torch.testing.assert_close(value, divergence(student, nearly))
    assert gradient.isfinite().all()
    assert gradient[0, 0] < 0


@each_divergence
def test_ids_that_both_rule_out_count_for_nothing(divergence):
    student, teacher = random_logits(6, 3, 5, 2.0)
    ruled_out = torch.full((3, 2), -math.inf, dtype=torch.float64)
    wide = torch.cat([student, ruled_out], -1).requires_grad_()
    values = divergence(wide, torch.cat([teacher, ruled_out], -1))
    torch.testing.assert_close(values, divergence(student, teacher))
    assert torch.autograd.grad(values.sum(), wide)[0].isfinite().all()


def test_reverse_kl_is_infinite_where_the_student_takes_what_the_teacher_rules_out():
    one_hot = torch.tensor([[0.0, -math.inf]])
    assert reverse_kl(torch.zeros(1, 2), one_hot).isposinf().all()


@each_divergence
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_float32(divergence, dtype):
    student, teacher = random_logits(7, 4, 50, 3.0).to(dtype)
    values = divergence(student, teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, divergence(student.float(), teacher.float()))


@each_divergence
def test_float64_stays_float64_beside_a_narrower_model(divergence):
    student, teacher = random_logits(8, 4, 50, 3.0)
    assert divergence(student.float(), teacher).dtype == torch.float64


def test_cross_entropy_is_minus_the_log_probability_of_the_target():
    student, _ = random_logits(9, 4, 7, 3.0)
    targets = torch.tensor([0, 6, 3, 3])
    expected = -student.softmax(-1).log()[torch.arange(4), targets]
    torch.testing.assert_close(cross_entropy(student, targets), expected)
    assert cross_entropy(student.half(), targets).dtype == torch.float32


@each_divergence
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_temperature_is_refused(divergence, temperature):
    with pytest.raises(ValueError, match=r"temperature=.* finite number above 0"):
        divergence(torch.zeros(1, 2), torch.zeros(1, 2), temperature=temperature)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, math.nan])
def test_the_ends_of_jsd_are_refused_with_what_to_take_instead(beta):
    with pytest.raises(ValueError, match=r"beta=.*\(0, 1\); take forward_kl or reverse_kl"):
        jsd(torch.zeros(1, 2), torch.zeros(1, 2), beta=beta)
