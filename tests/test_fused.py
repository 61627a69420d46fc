import functools
import math
from dataclasses import replace

import pytest
import torch
from found_divergences import all_divergences, function_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neo.losses import chunk
from neo.losses.distillation import Distillation
from neo.losses.divergences import (
    adaptive_kl,
    cross_entropy,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from neo.losses.fused import fused_sums
from neo.losses.given import HiddenStates
from neo.losses.head import Head


def handmade(student_logits, teacher_logits, *, temperature=1.0):
    """A user's own divergence: no closed form, no keyword of ours."""
    gap = student_logits.softmax(-1) - teacher_logits.softmax(-1)
    return temperature**2 * gap.square().sum(-1)


GIVEN = {
    "forward_kl": forward_kl,
    "forward_kl_partial": functools.partial(forward_kl),
    "reverse_kl": reverse_kl,
    "jsd": functools.partial(jsd, beta=0.3),
    "skew_forward_kl": functools.partial(skew_forward_kl, skew=0.2),
    "skew_reverse_kl": functools.partial(skew_reverse_kl, skew=0.2),
    "skew_0": functools.partial(skew_reverse_kl, skew=0.0),
    "adaptive_kl": functools.partial(adaptive_kl, head_mass=0.4),
    "total_variation": total_variation,
    "handmade": handmade,
}
# A new one is held to the same unasked.
TRIED = {function_of(divergence) for divergence in GIVEN.values()}
DIVERGENCES = GIVEN | {
    name: divergence
    for name, divergence in all_divergences().items()
    if function_of(divergence) not in TRIED
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.6},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "logit_scale": 0.6, "softcap": 3.0},
}
WIDER = (torch.float32, torch.float64)
TOKENS, VOCAB, PADDED, D_STUDENT, D_TEACHER = 23, 17, 21, 6, 10


def gib(tokens):
    # of float64 logits, student and teacher and five temporaries
    return tokens * (2 + 5) * VOCAB * 8 * 1.001 / 2**30


each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
each_head = pytest.mark.parametrize("form", HEADS.values(), ids=HEADS)
each_temperature = pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0, 8.0])
whether_trained = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])


class Case:
    """Hidden states and heads of a student and a teacher over the same tokens."""

    def __init__(
        self,
        form=None,
        *,
        trained=False,
        tokens=TOKENS,
        dtype=torch.float64,
        rows=VOCAB,
        device="cpu",
    ):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return drawn.to(device, dtype)

        form = dict(form or {})
        biased = form.pop("bias", False)
        self.hidden = normal(tokens, D_STUDENT).requires_grad_()
        self.teacher_hidden = normal(tokens, D_TEACHER)
        self.targets = torch.randint(VOCAB, (tokens,), generator=generator).to(device)
        self.head = Head(
            weight=normal(rows, D_STUDENT).requires_grad_(trained),
            bias=normal(rows).requires_grad_(trained) if biased else None,
            **form,
        )
        self.teacher_head = Head(
            weight=normal(PADDED, D_TEACHER) / 2, bias=normal(PADDED) if biased else None, **form
        )
        self.leaves = [
            leaf
            for leaf in (self.hidden, self.head.weight, self.head.bias)
            if leaf is not None and leaf.requires_grad
        ]

    def given(self):
        return HiddenStates(hidden=self.teacher_hidden, head=self.teacher_head)

    def sums(self, spec, *, teacher=True, **kwargs):
        return fused_sums(
            self.hidden,
            self.head,
            self.given() if teacher else None,
            self.targets,
            spec,
            VOCAB,
            **kwargs,
        )

    def logits(self, hidden, head):
        """Full logits, written from the head's definition."""
        logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
        logits = logits * head.logit_scale
        return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()

    def reference(self, spec):
        """Loss, ce and kd by plain autograd over the shared ids of full logits."""
        student = self.logits(self.hidden, self.head)[:, :VOCAB]
        teacher = self.logits(self.teacher_hidden, self.teacher_head)[:, :VOCAB]
        ce = cross_entropy(student, self.targets).sum()
        kd = spec.divergence(student, teacher, temperature=spec.temperature).sum()
        return (1 - spec.kd_ratio) * ce + spec.kd_ratio * kd, ce, kd

    def gradients(self, loss, **kwargs):
        return torch.autograd.grad(loss, self.leaves, **kwargs)


@each_divergence
@each_head
@whether_trained
@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_autograd_over_full_logits(
    divergence, form, trained, kd_ratio
):
    case = Case(form, trained=trained, rows=PADDED - 2)
    spec = Distillation(divergence=divergence, kd_ratio=kd_ratio, chunk_gib=gib(5))
    sums, (loss, ce, kd) = case.sums(spec, measure=True), case.reference(spec)
    torch.testing.assert_close([sums.loss, sums.ce, sums.kd], [loss, ce, kd])
    assert sums.tokens == TOKENS
    for actual, expected in zip(case.gradients(sums.loss), case.gradients(loss), strict=True):
        torch.testing.assert_close(actual, expected)


@each_divergence
@each_temperature
@pytest.mark.parametrize("kd_ratio", [0.3, 1.0])
def test_every_temperature_gives_the_loss_and_gradient_of_full_logits(
    divergence, temperature, kd_ratio
):
    case = Case(HEADS["all"], trained=True)
    spec = Distillation(divergence=divergence, kd_ratio=kd_ratio, temperature=temperature)
    sums, (loss, _, kd) = case.sums(spec), case.reference(spec)
    torch.testing.assert_close([sums.loss, sums.kd], [loss, kd])
    for actual, expected in zip(case.gradients(sums.loss), case.gradients(loss), strict=True):
        torch.testing.assert_close(actual, expected)


@each_divergence
@each_head
@whether_trained
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, TOKENS + 1, 1000])
def test_chunk_size_changes_neither_loss_nor_gradient(divergence, form, trained, chunk_tokens):
    case = Case(form, trained=trained)
    whole, parts = (
        case.sums(Distillation(divergence=divergence, chunk_gib=gib(size)))
        for size in (TOKENS, chunk_tokens)
    )
    torch.testing.assert_close(vars(parts), vars(whole))
    for actual, expected in zip(
        case.gradients(parts.loss), case.gradients(whole.loss), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@each_divergence
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_how_many_rows_are_worked_on_at_a_time_changes_nothing(divergence, rows, monkeypatch):
    case = Case(trained=True)
    spec = Distillation(divergence=divergence, chunk_gib=gib(9))
    expected = case.sums(spec)
    monkeypatch.setitem(chunk.BLOCK_ELEMENTS, "cpu", rows * VOCAB)
    actual = case.sums(spec)
    torch.testing.assert_close(vars(actual), vars(expected))
    torch.testing.assert_close(case.gradients(actual.loss), case.gradients(expected.loss))


@each_divergence
def test_kd_ratio_0_is_the_cross_entropy_and_1_the_divergence(divergence):
    case = Case()
    none, all_ = (
        case.sums(Distillation(divergence=divergence, kd_ratio=ratio), measure=True)
        for ratio in (0.0, 1.0)
    )
    student = case.logits(case.hidden, case.head)
    teacher = case.logits(case.teacher_hidden, case.teacher_head)[:, :VOCAB]
    ce = torch.nn.functional.cross_entropy(student, case.targets, reduction="sum")
    kd = divergence(student, teacher, temperature=1.0).sum()
    torch.testing.assert_close([none.loss, all_.loss], [ce, kd])
    torch.testing.assert_close(case.gradients(none.loss), case.gradients(ce, retain_graph=True))
    torch.testing.assert_close(case.gradients(all_.loss), case.gradients(kd))


@each_head
def test_without_a_teacher_the_loss_is_the_cross_entropy_and_nothing_is_said_of_one(form):
    case = Case(form, trained=True)
    sums = case.sums(Distillation(kd_ratio=0.0, chunk_gib=gib(4)), teacher=False)
    ce = cross_entropy(case.logits(case.hidden, case.head), case.targets).sum()
    torch.testing.assert_close([sums.loss, sums.ce], [ce, ce])
    torch.testing.assert_close(case.gradients(sums.loss), case.gradients(ce))
    assert (sums.kd, sums.agree, sums.teacher_mass_out) == (None, None, None)


@pytest.mark.parametrize("form", [HEADS["plain"], HEADS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("divergence", [forward_kl, jsd])
def test_gradients_are_those_of_finite_differences(form, divergence):
    case = Case(form, trained=True, tokens=5)
    spec = Distillation(divergence=divergence, kd_ratio=0.7, temperature=2.0, chunk_gib=gib(2))
    # gradcheck moves the leaves in place, and `sums` reads them from the case.
    assert torch.autograd.gradcheck(lambda *_: case.sums(spec).loss, case.leaves, fast_mode=True)


@each_temperature
def test_padded_heads_are_compared_over_the_shared_ids_and_the_mass_outside_is_reported(
    temperature,
):
    case = Case(rows=VOCAB + 1)
    sums = case.sums(Distillation(temperature=temperature, chunk_gib=gib(4)))
    full = case.logits(case.teacher_hidden, case.teacher_head).softmax(-1)
    renormalised = full[:, :VOCAB] / full[:, :VOCAB].sum(-1, keepdim=True)
    student = case.logits(case.hidden, case.head)[:, :VOCAB]
    expected = forward_kl(student, renormalised.log(), temperature=temperature).sum()
    torch.testing.assert_close(sums.kd, expected.detach())
    torch.testing.assert_close(sums.teacher_mass_out, full[:, VOCAB:].sum())
    assert sums.teacher_mass_out > 0.1


def test_a_teacher_without_padding_leaves_no_mass_out():
    case = Case()
    case.teacher_head = Head(weight=case.teacher_head.weight[:VOCAB])
    assert case.sums(Distillation()).teacher_mass_out == 0


def test_what_stands_in_the_padding_rows_changes_nothing_but_the_mass_left_out():
    case = Case(rows=PADDED, trained=True)
    before = case.sums(Distillation())
    gradients = case.gradients(before.loss)
    with torch.no_grad():
        case.head.weight[VOCAB:] += 3
        case.teacher_head.weight[VOCAB:] += 3
    after = case.sums(Distillation())
    torch.testing.assert_close([after.ce, after.kd], [before.ce, before.kd])
    torch.testing.assert_close(case.gradients(after.loss), gradients)
    assert (gradients[1][VOCAB:] == 0).all()
    assert after.teacher_mass_out != before.teacher_mass_out


@given(seed=st.integers(0, 2**32 - 1), like=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_agreement_counts_the_tokens_whose_most_likely_id_is_the_same(seed, like):
    generator = torch.Generator().manual_seed(seed)
    case = Case()
    case.teacher_hidden = torch.cat(
        [case.hidden.detach(), torch.zeros(TOKENS, D_TEACHER - D_STUDENT, dtype=torch.float64)], -1
    )
    noise = torch.randn(VOCAB, D_TEACHER, generator=generator, dtype=torch.float64)
    noise[:, :D_STUDENT] = like * case.head.weight + (1 - like) * noise[:, :D_STUDENT]
    case.teacher_head = Head(weight=noise)
    student = case.logits(case.hidden, case.head).argmax(-1)
    teacher = case.logits(case.teacher_hidden, case.teacher_head).argmax(-1)
    assert case.sums(Distillation(chunk_gib=gib(4))).agree == (student == teacher).sum()


@each_divergence
def test_a_student_equal_to_its_teacher_has_no_divergence_and_agrees_on_every_token(divergence):
    case = Case(dtype=torch.float32)
    case.teacher_hidden, case.teacher_head = case.hidden.detach(), case.head
    sums = case.sums(Distillation(divergence=divergence, kd_ratio=1.0))
    torch.testing.assert_close(sums.kd, torch.tensor(0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        case.gradients(sums.loss)[0], torch.zeros_like(case.hidden), rtol=0, atol=1e-5
    )
    assert sums.agree == TOKENS


@pytest.mark.parametrize("teacher", [True, False])
@whether_trained
def test_no_tokens_give_zero_sums_and_zero_gradients(teacher, trained):
    case = Case(trained=trained, tokens=0)
    sums = case.sums(Distillation(kd_ratio=0.5 if teacher else 0.0), teacher=teacher)
    assert sums.loss == sums.ce == sums.tokens == 0
    assert sums.kd == (0 if teacher else None)
    for gradient in case.gradients(sums.loss):
        assert (gradient == 0).all()


def test_only_the_loss_carries_gradient():
    case = Case(trained=True)
    case.teacher_hidden.requires_grad_()
    sums = case.sums(Distillation())
    carriers = [name for name, value in vars(sums).items() if value.requires_grad]
    assert carriers == ["loss"]
    sums.loss.backward()
    assert case.teacher_hidden.grad is None


def test_without_gradients_the_teacher_is_compared_with_even_where_it_weighs_nothing():
    case = Case(trained=True)
    expected = case.sums(Distillation(kd_ratio=0.5))
    spec = Distillation(kd_ratio=0.0)
    with torch.no_grad():
        unweighted = case.sums(spec)
    assert not unweighted.loss.requires_grad
    torch.testing.assert_close([unweighted.kd, unweighted.agree], [expected.kd, expected.agree])
    assert case.sums(spec).kd is None
    torch.testing.assert_close(case.sums(spec, measure=True).kd, expected.kd)


@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0])
def test_the_gradient_scales_with_what_comes_in_and_survives_a_second_backward(factor):
    case = Case(trained=True)
    sums = case.sums(Distillation())
    unit = case.gradients(case.sums(Distillation()).loss)
    for _ in range(2):
        scaled = torch.autograd.grad(sums.loss * factor, case.leaves, retain_graph=True)
        torch.testing.assert_close(scaled, tuple(factor * gradient for gradient in unit))


def test_a_gradient_of_the_gradient_is_refused():
    case = Case()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(case.sums(Distillation()).loss, case.hidden, create_graph=True)


class Recorder(TorchDispatchMode):
    """Remembers every operation and the largest tensor that any of them made."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        if "mm" in str(func) or "linear_pointwise" in str(func):
            self.products.append(tuple(out.shape))
        return out


@each_divergence
@each_head
@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_ever_holds_the_logits_of_more_than_one_chunk(divergence, form, grad):
    case = Case(form)
    spec = Distillation(divergence=divergence, temperature=2.0, chunk_gib=gib(7))
    with torch.set_grad_enabled(grad), Recorder() as recorder:
        sums = case.sums(spec)
        if grad:
            sums.loss.backward()
    # the largest is then an input, which only passes through
    assert recorder.largest <= max(7 * PADDED, TOKENS * D_TEACHER) < TOKENS * VOCAB


def test_a_frozen_head_costs_three_products_per_chunk_and_two_without_gradients():
    case = Case()
    case.teacher_head = Head(weight=case.teacher_head.weight[:VOCAB])
    spec = Distillation(chunk_gib=gib(TOKENS))
    with Recorder() as training:
        case.sums(spec).loss.backward()
    with torch.no_grad(), Recorder() as validation:
        case.sums(spec)
    logits = (TOKENS, VOCAB)
    assert training.products == [logits, logits, (TOKENS, D_STUDENT)]
    assert validation.products == [logits, logits]


@each_divergence
def test_half_precision_models_get_gradients_in_their_dtype_and_sums_in_float32(divergence):
    case = Case(dtype=torch.bfloat16, trained=True)
    spec = Distillation(divergence=divergence, chunk_gib=gib(5))
    sums = case.sums(spec)
    loss, ce, kd = case.reference(spec)
    assert {sums.loss.dtype, sums.ce.dtype, sums.kd.dtype} == {torch.float32}
    torch.testing.assert_close(
        [sums.loss, sums.ce, sums.kd], [loss, ce, kd], rtol=1e-2, atol=1e-2, check_dtype=False
    )
    for actual, expected in zip(case.gradients(sums.loss), case.gradients(loss), strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)


def test_under_autocast_products_are_in_its_dtype_and_gradients_in_that_of_the_model():
    case, spec = Case(dtype=torch.float32, trained=True), Distillation(chunk_gib=gib(5))
    expected = case.sums(spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = case.sums(spec)
    assert sums.loss.dtype == torch.float32
    assert sums.loss != expected.loss
    torch.testing.assert_close(sums.loss, expected.loss, rtol=1e-2, atol=0)
    for actual, exact in zip(case.gradients(sums.loss), case.gradients(expected.loss), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, exact, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("divergence", [forward_kl, jsd])
def test_a_teacher_that_rules_ids_out_by_its_bias_gives_no_nan(divergence):
    case = Case({"bias": True})
    case.teacher_head.bias[[2, 5]] = -math.inf
    spec = Distillation(divergence=divergence)
    sums, (loss, _, kd) = case.sums(spec), case.reference(spec)
    assert sums.loss.isfinite()
    torch.testing.assert_close(sums.kd, kd.detach())
    torch.testing.assert_close(case.gradients(sums.loss), case.gradients(loss))


def test_an_infinite_divergence_that_weighs_nothing_leaves_the_loss_finite():
    case = Case({"bias": True})
    case.teacher_head.bias[[2, 5]] = -math.inf
    sums = case.sums(Distillation(divergence=reverse_kl, kd_ratio=0.0), measure=True)
    assert sums.kd.isposinf()
    torch.testing.assert_close(sums.loss.detach(), sums.ce)
    assert case.gradients(sums.loss)[0].isfinite().all()


def test_logits_of_80_and_a_one_hot_teacher_give_the_loss_of_full_logits():
    case = Case(dtype=torch.float32)
    with torch.no_grad():
        case.hidden *= 80
        case.teacher_hidden *= 80
    spec = Distillation()
    sums, (loss, _, _) = case.sums(spec), case.reference(spec)
    torch.testing.assert_close(sums.loss, loss.detach())
    torch.testing.assert_close(case.gradients(sums.loss), case.gradients(loss))


def test_a_ratio_above_0_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match=r"loss\.kd_ratio=0\.5: must be 0 where there is no"):
        Case().sums(Distillation(kd_ratio=0.5), teacher=False)


@pytest.mark.parametrize("vocab", [0, VOCAB + 1])
def test_more_ids_than_a_head_has_rows_are_refused(vocab):
    case = Case()
    with pytest.raises(ValueError, match=rf"vocab={vocab}: .* 17 rows of student_head"):
        fused_sums(case.hidden, case.head, None, case.targets, Distillation(kd_ratio=0.0), vocab)


def test_a_softcap_of_0_is_refused():
    with pytest.raises(ValueError, match=r"softcap=0\.0: must be above 0"):
        Head(weight=torch.zeros(2, 2), softcap=0.0)


@each_head
def test_a_head_gives_float32_logits_over_the_ids_asked_for(form):
    case = Case(form)
    expected = case.logits(case.teacher_hidden, case.teacher_head)
    torch.testing.assert_close(case.teacher_head.logits(case.teacher_hidden), expected)
    torch.testing.assert_close(
        case.teacher_head.logits(case.teacher_hidden, stop=VOCAB), expected[:, :VOCAB]
    )
    half = case.teacher_head.to(torch.bfloat16).logits(case.teacher_hidden.bfloat16(), stop=VOCAB)
    assert half.dtype == torch.float32


class Branched(Case):
    """A student whose head has a LoRA branch of rank 3, as `models.head` hands it over."""

    def __init__(self, form=None, **kwargs):
        super().__init__(form, **kwargs)
        generator = torch.Generator().manual_seed(1)
        rows, dtype = len(self.head.weight), self.hidden.dtype
        self.down, self.up = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in ((3, D_STUDENT), (rows, 3))
        )
        self.leaves += [self.down, self.up]

    def sums(self, spec, **kwargs):
        return fused_sums(
            self.hidden,
            replace(self.head, branch=0.5 * self.up),
            self.given(),
            self.targets,
            spec,
            VOCAB,
            student_branch=self.hidden @ self.down.T,
            **kwargs,
        )

    def logits(self, hidden, head):
        if head is not self.head:
            return super().logits(hidden, head)
        return super().logits(hidden, replace(head, weight=head.weight + 0.5 * self.up @ self.down))


@each_divergence
@each_head
@whether_trained
def test_a_branch_on_the_head_gives_the_loss_and_gradients_of_the_adapted_weight(
    divergence, form, trained
):
    case = Branched(form, trained=trained, rows=PADDED - 2)
    spec = Distillation(divergence=divergence, kd_ratio=0.3, temperature=2.0, chunk_gib=gib(5))
    sums, (loss, ce, kd) = case.sums(spec), case.reference(spec)
    torch.testing.assert_close([sums.loss, sums.ce, sums.kd], [loss, ce, kd])
    for actual, expected in zip(case.gradients(sums.loss), case.gradients(loss), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_branch_without_its_input_and_a_teacher_with_a_branch_are_refused():
    case = Branched()
    head = replace(case.head, branch=case.up)
    rest = (case.given(), case.targets, Distillation(), VOCAB)
    with pytest.raises(ValueError, match=r"student_branch and student_head\.branch: give both"):
        fused_sums(case.hidden, head, *rest)
    with pytest.raises(ValueError, match="needs its input"):
        head.logits(case.hidden)
    case.teacher_head = replace(case.teacher_head, branch=torch.zeros(PADDED, 3))
    with pytest.raises(ValueError, match=r"teacher_head\.branch: must be None"):
        case.sums(Distillation())


@each_head
@each_temperature
def test_entropy_and_the_teachers_probability_of_the_target_are_taken_at_temperature_1(
    form, temperature
):
    case = Case(form, rows=PADDED)
    sums = case.sums(Distillation(temperature=temperature, chunk_gib=gib(4)))
    q = case.logits(case.hidden, case.head)[:, :VOCAB].softmax(-1)
    p = case.logits(case.teacher_hidden, case.teacher_head)[:, :VOCAB].softmax(-1)
    torch.testing.assert_close(sums.student_entropy, -(q * q.log()).sum().detach())
    torch.testing.assert_close(sums.teacher_target, p.gather(1, case.targets[:, None]).sum())


@each_divergence
@each_head
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_full_logits_in_float32_of_the_same_inputs(
    divergence, form, dtype
):
    spec = Distillation(divergence=divergence, kd_ratio=0.7, chunk_gib=gib(5))
    half, single, double = (Case(form, trained=True, dtype=d) for d in (dtype, *WIDER))
    for case in (single, double):
        with torch.no_grad():
            for to, of in zip(case.leaves, half.leaves, strict=True):
                to.copy_(of)
        case.teacher_hidden = half.teacher_hidden.to(case.hidden.dtype)
        case.teacher_head = half.teacher_head.to(case.hidden.dtype)
    exact, in_single, sums = double.reference(spec)[0], single.reference(spec)[0], half.sums(spec)
    assert (sums.loss - exact).abs() <= 2 * (in_single - exact).abs() + 1e-6 * exact.abs()
    gradients = zip(
        half.gradients(sums.loss),
        single.gradients(in_single),
        double.gradients(exact),
        strict=True,
    )
    for ours, theirs, true in gradients:
        rounded = (theirs.to(dtype) - true).norm()  # autograd, too, hands halves back
        assert (ours - true).norm() <= 1.01 * rounded + 1e-6 * true.norm()


def test_a_single_token_gives_its_own_loss_and_gradient():
    case, spec = Case(tokens=1, trained=True), Distillation()
    sums, (loss, _, _) = case.sums(spec), case.reference(spec)
    torch.testing.assert_close(sums.loss, loss)
    torch.testing.assert_close(case.gradients(sums.loss), case.gradients(loss))


@pytest.mark.parametrize(
    ("chunk_gib", "chunks"),
    # of 300 tokens: 4 bytes an id, twice, and a block of 2 ** 19 ids five times over
    [(None, [100] * 3), (1.0, [300]), (0.05, [100] * 3), (0.03, [60] * 5), (1e-9, [1] * 300)],
)
def test_chunks_take_the_memory_they_may_and_are_of_like_length(chunk_gib, chunks):
    vocab, tokens = 40_000, 300
    head = Head(weight=torch.zeros(vocab, 1))
    hidden = torch.zeros(tokens, 1)
    targets = torch.zeros(tokens, dtype=torch.int64)
    with torch.no_grad(), Recorder() as recorder:
        teacher = HiddenStates(hidden=hidden, head=head)
        fused_sums(hidden, head, teacher, targets, Distillation(chunk_gib=chunk_gib), vocab)
    assert recorder.products == [(chunk, vocab) for chunk in chunks for _ in range(2)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_divergence
@each_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_gives_the_loss_and_gradients_of_the_cpu(divergence, form, dtype):
    spec = Distillation(divergence=divergence, kd_ratio=0.7, temperature=2.0, chunk_gib=gib(5))
    on_cpu = Case(form, trained=True, dtype=dtype)
    on_gpu = Case(form, trained=True, dtype=dtype, device="cuda")
    expected, actual = on_cpu.sums(spec), on_gpu.sums(spec)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual.loss.cpu(), expected.loss, rtol=tolerance, atol=tolerance)
    gradients = zip(on_gpu.gradients(actual.loss), on_cpu.gradients(expected.loss), strict=True)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours.cpu(), theirs, rtol=5 * tolerance, atol=5 * tolerance)
