"""What a teacher may give instead of hidden states, against what its hidden states give."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from found_divergences import all_divergences

from neo.losses.chunk import BLOCK_ELEMENTS
from neo.losses.distillation import Distillation
from neo.losses.divergences import forward_kl, reverse_kl
from neo.losses.fused import fused_sums
from neo.losses.given import Facts, HiddenStates, Listed, Projected
from neo.losses.head import Head

TOKENS, VOCAB, PADDED, D, D_TEACHER = 7, 15, 17, 6, 8
each_divergence = pytest.mark.parametrize(
    "divergence", all_divergences().values(), ids=all_divergences()
)


class Case:
    """A student and a teacher; the teacher's probabilities come from its definition."""

    def __init__(self, dtype=torch.float64, *, bias=False, logit_scale=1.0, tokens=TOKENS):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = normal(tokens, D).requires_grad_()
        self.head = Head(
            weight=normal(PADDED, D), bias=normal(PADDED) if bias else None, logit_scale=logit_scale
        )
        self.states = HiddenStates(
            hidden=normal(tokens, D_TEACHER), head=Head(weight=normal(PADDED, D_TEACHER))
        )
        self.targets = torch.randint(VOCAB, (tokens,), generator=generator)

    def p(self, temperature=1.0):
        full = self.states.hidden @ self.states.head.weight.T
        return (full[:, :VOCAB] / temperature).softmax(-1)

    def facts(self):
        p = self.p()
        full = (self.states.hidden @ self.states.head.weight.T).softmax(-1)
        return Facts(
            target=p.gather(-1, self.targets[:, None])[:, 0],
            top=p.argmax(-1),
            mass_out=full[:, VOCAB:].sum(-1),
        )

    def projected(self, temperature=1.0):
        p, head = self.p(temperature), self.head
        return Projected(
            mean_row=p @ head.weight[:VOCAB],
            mean_bias=None if head.bias is None else p @ head.bias[:VOCAB],
            entropy=-(p * p.log()).sum(-1),
            temperature=temperature,
            facts=self.facts(),
        )

    def listed(self, k, temperature=1.0, unused=0):
        p, ids = self.p(temperature).sort(-1, descending=True)
        log_p = torch.cat([p[:, :k].log(), torch.full((len(p), unused), -torch.inf)], -1)
        ids = torch.cat([ids[:, :k], torch.zeros(len(p), unused, dtype=torch.int64)], -1)
        return Listed(
            ids=ids,
            log_p=log_p,
            log_rest=p[:, k:].sum(-1).log(),
            entropy=None,
            temperature=temperature,
            facts=self.facts(),
        )

    def sums(self, given, spec, **keys):
        self.hidden.grad = None
        sums = fused_sums(self.hidden, self.head, given, self.targets, spec, VOCAB, **keys)
        if sums.loss.requires_grad:
            sums.loss.backward()
        return sums, self.hidden.grad


def assert_same(case, given, spec, **tolerance):
    expected, gradient = case.sums(case.states, spec, measure=True)
    actual, its = case.sums(given, spec, measure=True)
    for name in (
        *("loss", "ce", "kd", "student_entropy", "teacher_target", "teacher_mass_out", "agree"),
    ):
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), msg=lambda m, n=name: f"{n}: {m}",
            **tolerance,
        )  # fmt: skip
    torch.testing.assert_close(its, gradient, **tolerance)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", [{}, {"bias": True, "logit_scale": 0.5}], ids=["plain", "biased"])
@pytest.mark.parametrize("block", [None, 2])
def test_a_mean_row_and_an_entropy_give_forward_kl(kd_ratio, temperature, form, block, monkeypatch):
    if block:
        monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", block * VOCAB)
    case = Case(**form)
    spec = Distillation(
        kd_ratio=kd_ratio, temperature=temperature, chunk_gib=1e-9 if block else None
    )
    assert_same(case, case.projected(temperature), spec, rtol=1e-12, atol=1e-12)


def test_in_float32_the_mean_row_is_as_good_as_the_logits():
    case = Case(torch.float32, tokens=200)
    exact = Case(tokens=200)
    spec = Distillation(kd_ratio=0.5)
    truth, gradient = exact.sums(exact.states, spec)
    errors = []
    for given in (case.states, case.projected()):
        sums, its = case.sums(given, spec)
        errors.append(
            (abs(sums.loss.item() / truth.loss.item() - 1), (its - gradient).norm().item())
        )
    assert errors[1][0] < 1e-6, errors
    assert errors[1][1] / gradient.norm() < 1e-6, errors


@pytest.mark.parametrize("distance", [1.0, 0.3, 0.1])
def test_in_bfloat16_a_student_near_its_teacher_keeps_its_gradient(distance):
    """What the two mean rows have in common may not be rounded before it is taken away."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 64, generator=generator, dtype=torch.float64)
    hidden = torch.randn(200, 64, generator=generator, dtype=torch.float64) / 2
    of_teacher = (
        hidden + distance * torch.randn(200, 64, generator=generator, dtype=torch.float64) / 8
    )
    weight, hidden = weight.bfloat16().double(), hidden.bfloat16().double()
    targets = torch.zeros(200, dtype=torch.int64)
    spec = Distillation(kd_ratio=1.0)

    def gradient(given, dtype):
        leaf = hidden.detach().clone().to(dtype).requires_grad_()
        fused_sums(leaf, Head(weight=weight.to(dtype)), given, targets, spec, 400).loss.backward()
        return leaf.grad.double()

    def online(dtype):
        return HiddenStates(hidden=of_teacher.to(dtype), head=Head(weight=weight.to(dtype)))

    p = (of_teacher.bfloat16().double() @ weight.T).softmax(-1)
    facts = Facts(target=p[:, 0], top=p.argmax(-1))
    projected = Projected(
        mean_row=(p @ weight).float(), entropy=-(p * p.log()).sum(-1).float(),
        temperature=1.0, facts=facts,
    )  # fmt: skip
    truth = gradient(
        HiddenStates(hidden=of_teacher.bfloat16().double(), head=Head(weight=weight)), torch.float64
    )
    errors = [
        (gradient(given, torch.bfloat16) - truth).norm() / truth.norm()
        for given in (online(torch.bfloat16), projected)
    ]
    assert errors[1] < 1.5 * errors[0] < 0.01, errors


@each_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("unused", [0, 2])
def test_a_list_of_every_id_gives_every_divergence(divergence, temperature, unused):
    case = Case()
    spec = Distillation(divergence=divergence, kd_ratio=0.3, temperature=temperature)
    assert_same(case, case.listed(VOCAB, temperature, unused), spec, rtol=1e-9, atol=1e-9)


def coarse(case, k, spec):
    """The divergence once all ids that are not listed are one, by autograd over full logits."""
    p, ids = case.p(spec.temperature).sort(-1, descending=True)
    logits = (case.hidden @ case.head.weight.T)[:, :VOCAB]
    q = (logits / spec.temperature).softmax(-1).gather(-1, ids)
    pairs = [torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], -1).log() for x in (q, p)]
    kd = spec.temperature**2 * spec.divergence(*pairs, temperature=1.0).sum()
    case.hidden.grad = None
    (spec.kd_ratio * kd).backward()
    return kd.detach(), case.hidden.grad


@each_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("unused", [0, 2])
def test_ids_that_are_not_listed_are_one_id_more(divergence, temperature, unused):
    case = Case()
    spec = Distillation(divergence=divergence, kd_ratio=1.0, temperature=temperature)
    expected, gradient = coarse(case, 4, spec)
    sums, its = case.sums(case.listed(4, temperature, unused), spec)
    torch.testing.assert_close(sums.kd, expected)
    torch.testing.assert_close(its, gradient)


def test_a_student_that_gives_ids_that_the_list_rules_out_is_told_so():
    case = Case()
    p, ids = case.p().sort(-1, descending=True)
    kept = p[:, :4] / p[:, :4].sum(-1, keepdim=True)
    listed = replace(
        case.listed(4), log_p=kept.log(), log_rest=torch.full((TOKENS,), -torch.inf).double()
    )
    q = (case.hidden @ case.head.weight.T)[:, :VOCAB].softmax(-1).gather(-1, ids)
    expected = (kept * (kept / q[:, :4]).log()).sum()
    torch.testing.assert_close(case.sums(listed, Distillation(kd_ratio=1.0))[0].kd, expected)
    reverse = Distillation(kd_ratio=1.0, divergence=reverse_kl)
    assert case.sums(listed, reverse)[0].kd == torch.inf


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_weights_that_are_the_probabilities_give_forward_kl(temperature):
    case = Case()
    p = case.p(temperature)
    whole = replace(
        case.listed(VOCAB, temperature, unused=1),
        log_rest=None,
        entropy=-(p * p.log()).sum(-1),
    )
    spec = Distillation(kd_ratio=0.3, temperature=temperature)
    assert_same(case, whole, spec, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_a_sample_is_linear_in_its_weights():
    case = Case()
    spec = Distillation(kd_ratio=1.0)
    p = case.p()
    entropy = -(p * p.log()).sum(-1)
    whole = replace(case.listed(VOCAB), log_rest=None, entropy=entropy)
    halves = []
    for keep in (slice(0, 7), slice(7, VOCAB)):  # twice one half of the ids, in the mean all
        ids, log_p = whole.ids[:, keep], whole.log_p[:, keep] + torch.tensor(2.0).log()
        halves.append(case.sums(replace(whole, ids=ids, log_p=log_p), spec)[1])
    torch.testing.assert_close(sum(halves) / 2, case.sums(whole, spec)[1])


def test_numbers_that_do_not_give_the_loss_are_refused():
    case = Case()
    projected = case.projected()
    with pytest.raises(ValueError, match=r"loss\.temperature=2\.0: .* of temperature 1\.0"):
        case.sums(projected, Distillation(temperature=2.0))
    with pytest.raises(ValueError, match="gives forward_kl alone"):
        case.sums(projected, Distillation(divergence=partial(reverse_kl)))
    case.sums(projected, Distillation(divergence=partial(forward_kl)))
    case.head = replace(case.head, softcap=5.0)
    with pytest.raises(ValueError, match=r"softcap=5\.0"):
        case.sums(projected, Distillation())
    case.head = Head(weight=case.head.weight.requires_grad_())
    with pytest.raises(ValueError, match="the head that it was made with"):
        case.sums(projected, Distillation())
