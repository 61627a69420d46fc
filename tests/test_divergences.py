import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.losses import divergences
from neo.losses.divergences import (
    adaptive_kl,
    adaptive_weights,
    cross_entropy,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from neo.losses.probabilities import entropy

DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd_0.5": jsd,
    "jsd_0.1": functools.partial(jsd, beta=0.1),
    "jsd_0.9": functools.partial(jsd, beta=0.9),
    "skew_forward_kl_0.1": skew_forward_kl,
    "skew_forward_kl_0.6": functools.partial(skew_forward_kl, skew=0.6),
    "skew_reverse_kl_0.1": skew_reverse_kl,
    "skew_reverse_kl_0.6": functools.partial(skew_reverse_kl, skew=0.6),
    "adaptive_kl_0.5": adaptive_kl,
    "adaptive_kl_0.8": functools.partial(adaptive_kl, head_mass=0.8),
    "total_variation": total_variation,
}
INFINITE_WHERE_THE_TEACHER_RULES_OUT = ("reverse_kl", "adaptive_kl_0.5", "adaptive_kl_0.8")
TEMPERATURES = [0.25, 1.0, 2.0, 8.0]

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
each_name = pytest.mark.parametrize("name", DIVERGENCES)
each_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)
logit_rows = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.tuples(st.just(seed), st.integers(1, 5), st.integers(2, 9), st.floats(0, 12))
)


def random_logits(seed, tokens, vocab, spread, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(2, tokens, vocab, generator=generator, dtype=dtype)


def ordinary_and_extreme_logits():
    """Random models, equal ones, and ones that are sure: of another id, or of none of the rest."""
    student, teacher = random_logits(10, 6, 4, 2.0, dtype=torch.float32)
    rows = [
        ([1.0, -2.0, 0.5, 3.0], [1.0, -2.0, 0.5, 3.0]),
        ([0.0, 0.0, 0.0, 0.0], [80.0, -80.0, -80.0, -80.0]),
        ([80.0, -80.0, 0.0, 10.0], [-80.0, 80.0, 3.0, 0.0]),
        ([-80.0, 79.0, 80.0, 0.0], [-80.0, 80.0, 79.0, 0.0]),
        ([0.4, 0.2, 0.0, 0.6], [0.0, 0.2, 0.6, 0.0]),
    ]
    return tuple(
        torch.cat([ordinary, torch.tensor(extreme)])
        for ordinary, extreme in zip((student, teacher), zip(*rows, strict=True), strict=True)
    )


def value_and_gradient(divergence, student, teacher, temperature):
    leaf = student.clone().requires_grad_()
    values = divergence(leaf, teacher, temperature=temperature)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def kl_of_lists(a, b):
    return math.fsum(x * math.log(x / y) if y else math.inf for x, y in zip(a, b, strict=True) if x)


def mixture_of_lists(a, b, weight):
    return [(1 - weight) * x + weight * y for x, y in zip(a, b, strict=True)]


def head_weight_of_lists(p, q, head_mass):
    """The published code's weight of forward KL, by going down the teacher's ids one by one."""
    head, mass = 0.0, 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: -p[i])):
        mass += p[i]
        if rank == 0 or mass <= head_mass:
            head += abs(p[i] - q[i])
    total = math.fsum(abs(x - y) for x, y in zip(p, q, strict=True))
    return head / total if total else 0.5


def published_definition(name, p, q):
    """Each divergence of two lists of probabilities, teacher's and student's, at temperature 1."""
    kind, _, parameter = name.rpartition("_")
    if name == "forward_kl":
        return kl_of_lists(p, q)
    if name == "reverse_kl":
        return kl_of_lists(q, p)
    if name == "total_variation":
        return math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
    number = float(parameter)
    if kind == "jsd":
        m = mixture_of_lists(q, p, number)
        return number * kl_of_lists(p, m) + (1 - number) * kl_of_lists(q, m)
    if kind == "skew_forward_kl":
        return kl_of_lists(p, mixture_of_lists(q, p, number))
    if kind == "skew_reverse_kl":
        return kl_of_lists(q, mixture_of_lists(p, q, number))
    weight = head_weight_of_lists(p, q, number)
    return weight * kl_of_lists(p, q) + (1 - weight) * kl_of_lists(q, p)


def softmax_of_list(logits, temperature):
    top = max(logits)
    terms = [math.exp((x - top) / temperature) for x in logits]
    return [x / math.fsum(terms) for x in terms]


@each_name
@each_temperature
def test_a_divergence_is_the_published_one_times_the_temperature_squared(name, temperature):
    student, teacher = ordinary_and_extreme_logits()
    expected = [
        temperature**2
        * published_definition(
            name, softmax_of_list(t, temperature), softmax_of_list(s, temperature)
        )
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    actual = DIVERGENCES[name](student.double(), teacher.double(), temperature=temperature)
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-14
    )


@each_divergence
@each_temperature
def test_float32_is_within_1e_5_of_float64(divergence, temperature):
    student, teacher = ordinary_and_extreme_logits()
    value, gradient = value_and_gradient(divergence, student, teacher, temperature)
    exact, exact_gradient = value_and_gradient(
        divergence, student.double(), teacher.double(), temperature
    )
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-12)
    # Of the largest gradient: where a student is sure, the true one is smaller than any rounding.
    torch.testing.assert_close(
        gradient.double(), exact_gradient, rtol=0.0, atol=1e-5 * exact_gradient.abs().max().item()
    )


def closed_form_gradient(name, p, q):
    """What the docstrings say of the gradient, at temperature 1."""
    kind, _, parameter = name.rpartition("_")

    def through_softmax(g):
        return q * (g - (q * g).sum(-1, keepdim=True))

    if name == "forward_kl":
        return q - p
    if name == "reverse_kl":
        log_ratio = (q / p).log()
        return q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True))
    if name == "total_variation":
        return through_softmax((q - p).sign() / 2)
    number = float(parameter)
    if kind == "jsd":
        m = number * p + (1 - number) * q
        return (1 - number) * through_softmax((q / m).log())
    if kind == "skew_forward_kl":
        m = number * p + (1 - number) * q
        return (1 - number) * q * ((p * q / m).sum(-1, keepdim=True) - p / m)
    if kind == "skew_reverse_kl":
        m = (1 - number) * p + number * q
        return through_softmax((q / m).log() - number * q / m)
    head, tail = adaptive_weights(p, q, number)
    return head[:, None] * (q - p) + tail[:, None] * through_softmax((q / p).log())


@each_name
@each_temperature
def test_the_gradient_of_a_divergence_is_the_one_its_docstring_says(name, temperature):
    student, teacher = random_logits(11, 5, 9, 2.0)
    _, gradient = value_and_gradient(DIVERGENCES[name], student, teacher, temperature)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    torch.testing.assert_close(gradient, temperature * closed_form_gradient(name, p, q))


LIMIT_AT_A_HIGH_TEMPERATURE = {
    "forward_kl": 1 / 2,
    "reverse_kl": 1 / 2,
    "jsd_0.5": 0.5 * 0.5 / 2,
    "jsd_0.1": 0.1 * 0.9 / 2,
    "jsd_0.9": 0.1 * 0.9 / 2,
    "skew_forward_kl_0.1": 0.9**2 / 2,
    "skew_forward_kl_0.6": 0.4**2 / 2,
    "skew_reverse_kl_0.1": 0.9**2 / 2,
    "skew_reverse_kl_0.6": 0.4**2 / 2,
    "adaptive_kl_0.5": 1 / 2,
    "adaptive_kl_0.8": 1 / 2,
}


@pytest.mark.parametrize("name", LIMIT_AT_A_HIGH_TEMPERATURE)
def test_at_a_high_temperature_a_smooth_divergence_is_the_variance_of_the_difference(name):
    student, teacher = random_logits(12, 5, 9, 2.0)
    variance = (teacher - student).var(-1, correction=0)
    torch.testing.assert_close(
        DIVERGENCES[name](student, teacher, temperature=1e4),
        LIMIT_AT_A_HIGH_TEMPERATURE[name] * variance,
        rtol=2e-3,
        atol=0.0,
    )


def test_at_a_high_temperature_total_variation_grows_with_it():
    student, teacher = random_logits(13, 5, 9, 2.0)
    gap = teacher - student
    deviation = (gap - gap.mean(-1, keepdim=True)).abs().mean(-1)
    for temperature in (1e4, 1e5):
        torch.testing.assert_close(
            total_variation(student, teacher, temperature=temperature),
            temperature / 2 * deviation,
            rtol=2e-3,
            atol=0.0,
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


@given(shape=logit_rows)
@settings(max_examples=25, deadline=None)
def test_jsd_and_total_variation_are_symmetric(shape):
    student, teacher = random_logits(*shape)
    torch.testing.assert_close(jsd(student, teacher), jsd(teacher, student))
    torch.testing.assert_close(total_variation(student, teacher), total_variation(teacher, student))


@given(shape=logit_rows, parameter=st.floats(0.001, 0.999))
@settings(max_examples=50, deadline=None)
def test_what_is_said_to_be_bounded_stays_below_its_bound(shape, parameter):
    student, teacher = (5 * logits for logits in random_logits(*shape))
    bound = -parameter * math.log(parameter) - (1 - parameter) * math.log1p(-parameter)
    rounding = 1 + 1e-12
    assert (total_variation(student, teacher) <= rounding).all()
    assert (jsd(student, teacher, beta=parameter) <= bound * rounding).all()
    for skewed in (skew_forward_kl, skew_reverse_kl):
        assert (skewed(student, teacher, skew=parameter) <= -math.log(parameter) * rounding).all()


@given(shape=logit_rows)
@settings(max_examples=25, deadline=None)
def test_twice_the_square_of_total_variation_is_at_most_either_kl(shape):
    student, teacher = random_logits(*shape)
    square = 2 * total_variation(student, teacher) ** 2 - 1e-12
    assert (square <= forward_kl(student, teacher)).all()
    assert (square <= reverse_kl(student, teacher)).all()


@pytest.mark.parametrize(
    ("skewed", "plain"), [(skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)]
)
def test_a_skewed_kl_is_the_plain_one_at_0_and_nothing_at_1(skewed, plain):
    student, teacher = random_logits(14, 5, 9, 2.0)
    for skew in (0, 1e-12):
        value = skewed(student, teacher, skew=skew)
        torch.testing.assert_close(value, plain(student, teacher), rtol=1e-6, atol=1e-9)
    assert (skewed(student, teacher, skew=1 - 1e-9) < 1e-6).all()


@given(shape=logit_rows, head_mass=st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_adaptive_kl_lies_between_forward_and_reverse_kl(shape, head_mass):
    student, teacher = random_logits(*shape)
    both = torch.stack([forward_kl(student, teacher), reverse_kl(student, teacher)])
    value = adaptive_kl(student, teacher, head_mass=head_mass)
    assert (value >= both.amin(0) - 1e-12).all()
    assert (value <= both.amax(0) * (1 + 1e-12) + 1e-12).all()


@pytest.mark.parametrize("head_mass", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_adaptive_weights_find_the_head_among_many_ids(head_mass, spread):
    student, teacher = random_logits(15, 4, 700, spread)
    p, q = teacher.softmax(-1), student.softmax(-1)
    head, tail = adaptive_weights(p, q, head_mass)
    rows = zip(p.tolist(), q.tolist(), strict=True)
    expected = torch.tensor([head_weight_of_lists(*row, head_mass) for row in rows]).double()
    torch.testing.assert_close(head, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head + tail, torch.ones_like(head))


def test_the_first_id_is_head_however_likely_and_the_one_that_crosses_is_tail():
    p = torch.tensor([[0.9, 0.06, 0.04], [0.4, 0.3, 0.3]])
    q = torch.tensor([[0.5, 0.46, 0.04], [0.3, 0.5, 0.2]])
    head, _ = adaptive_weights(p, q, 0.5)
    torch.testing.assert_close(head, torch.tensor([0.4 / 0.8, 0.1 / 0.4]))


def test_an_id_that_the_teacher_rules_out_is_never_head():
    p = torch.tensor([[0.75, 0.25, 0.0]])
    q = torch.tensor([[0.5, 0.25, 0.25]])
    _, tail = adaptive_weights(p, q, 1 - 1e-12)
    assert tail.tolist() == [0.5]


def test_adaptive_weights_are_one_half_where_the_models_are_equal():
    p = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    for weight in adaptive_weights(p, p.clone(), 0.5):
        assert weight.tolist() == [0.5, 0.5]


def test_adaptive_weights_leave_what_they_are_given_as_it_was():
    p, q = (logits.softmax(-1) for logits in random_logits(16, 3, 5, 2.0))
    before = p.clone(), q.clone()
    adaptive_weights(p, q, 0.5)
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


@each_temperature
def test_adaptive_kl_holds_its_weights_constant_for_the_gradient(temperature, monkeypatch):
    student, teacher = random_logits(17, 3, 5, 2.0)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    weights = adaptive_weights(p, q, 0.5)
    _, gradient = value_and_gradient(adaptive_kl, student, teacher, temperature)
    monkeypatch.setattr(divergences, "adaptive_weights", lambda p, q, head_mass: weights)
    _, held = value_and_gradient(adaptive_kl, student, teacher, temperature)
    torch.testing.assert_close(gradient, held)
    assert torch.autograd.gradcheck(
        lambda s: adaptive_kl(s, teacher, temperature=temperature), student.requires_grad_()
    )


def test_a_weight_of_0_hides_an_infinite_divergence():
    # Equal on the head, unlike on the tail, where the student rules out what the teacher allows.
    p = torch.tensor([[0.5, 0.25, 0.25]])
    q = torch.tensor([[0.5, 0.5, 0.0]])
    assert forward_kl(q.log(), p.log()).isposinf().all()
    torch.testing.assert_close(adaptive_kl(q.log(), p.log()), reverse_kl(q.log(), p.log()))


@pytest.mark.parametrize(
    "name", [n for n in DIVERGENCES if n not in INFINITE_WHERE_THE_TEACHER_RULES_OUT]
)
def test_ids_that_the_teacher_rules_out_give_no_nan(name):
    divergence = DIVERGENCES[name]
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


@pytest.mark.parametrize("name", INFINITE_WHERE_THE_TEACHER_RULES_OUT)
def test_reverse_kl_is_infinite_where_the_student_takes_what_the_teacher_rules_out(name):
    one_hot = torch.tensor([[0.0, -math.inf]])
    assert DIVERGENCES[name](torch.zeros(1, 2), one_hot).isposinf().all()


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


@pytest.mark.parametrize("divergence", [skew_forward_kl, skew_reverse_kl])
@pytest.mark.parametrize("skew", [1, 1.0, -0.1, math.nan])
def test_a_skew_that_leaves_nothing_to_compare_is_refused(divergence, skew):
    with pytest.raises(ValueError, match=r"skew=.*\[0, 1\)"):
        divergence(torch.zeros(1, 2), torch.zeros(1, 2), skew=skew)


@pytest.mark.parametrize("head_mass", [0, 0.0, 1, -0.5, math.nan])
def test_a_head_of_nothing_or_of_everything_is_refused(head_mass):
    with pytest.raises(ValueError, match=r"head_mass=.*\(0, 1\); take forward_kl instead of 1"):
        adaptive_kl(torch.zeros(1, 2), torch.zeros(1, 2), head_mass=head_mass)


def test_entropy_is_that_of_the_distribution_and_ids_ruled_out_add_nothing():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(entropy(logits), expected.float())
    ruled_out = torch.cat([logits, torch.full((7, 3), -math.inf)], dim=1).requires_grad_()
    torch.testing.assert_close(entropy(ruled_out), expected.float())
    (gradient,) = torch.autograd.grad(entropy(ruled_out).sum(), ruled_out)
    assert gradient.isfinite().all()
