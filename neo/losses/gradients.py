"""Closed forms: a divergence per token and its gradient, from probabilities at the temperature.

The definitions, with the formulas of these gradients, stand in `neo.losses.divergences`; these are
the same numbers without autograd, whose graph would hold every intermediate of a block. Gradients
are in the softened logits: where a divergence has the slope g in the student's probabilities q,
they are q (g - <q, g>), blind to a constant in g.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neo.losses.distillation import Divergence
from neo.losses.divergences import (
    adaptive_kl,
    adaptive_weights,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from neo.losses.products import wide

Rows = Float[Tensor, "block vocab"]
PerToken = Float[Tensor, " block"]
# Nats per token without the temperature squared, and the gradient where it was asked for.
ValueAndGradient = tuple[PerToken, Rows | None]


@dataclass(frozen=True)
class Softened:
    """One block of student and teacher at one temperature.

    Args:
        a: The student's logits over the temperature.
        b: The teacher's; minus infinity where it rules an id out.
        q: Softmax of `a`.
        p: Softmax of `b`.
        log_z_a: Log of the sum of exponentials of `a`.
        log_z_b: The same of `b`.
    """

    a: Rows
    b: Rows
    q: Rows
    p: Rows
    log_z_a: PerToken
    log_z_b: PerToken

    def log_q_over_p(self) -> Rows:
        """log(q / p) per id; infinite where the teacher rules an id out."""
        # Subtracting the logits first loses nothing where they are close.
        return torch.sub(self.a, self.b).add_(_column(self.log_z_b - self.log_z_a, self.a))


def _forward_kl(x: Softened, *, gradient: bool) -> ValueAndGradient:
    # Where p = 0 a finite ratio will do, and 0 * inf is NaN.
    ratio = x.log_q_over_p().clamp_max_(torch.finfo(x.p.dtype).max)
    return _kl(x.p, x.q, ratio), torch.sub(x.q, x.p) if gradient else None


def _reverse_kl(x: Softened, *, gradient: bool) -> ValueAndGradient:
    # Infinite where the teacher rules an id out, unless the student gives it nothing either.
    slope = x.log_q_over_p().masked_fill_(x.q == 0, 0.0)
    value = _kl(x.q, x.p, -slope)
    return value, _centred(x.q, slope) if gradient else None


def _jsd(x: Softened, *, beta: float = 0.5, gradient: bool) -> ValueAndGradient:
    gap = _gap_over_mixture(x.p, x.q, beta)
    slope = _log_plus_1(gap * -beta)  # log(q / mixture)
    of_teacher = _log_plus_1(gap.mul_(1 - beta)).mul_(x.p)
    of_student = x.q * slope
    value = of_teacher.mul_(beta).add_(of_student, alpha=1 - beta).sum(-1)
    return value, _centred(x.q, slope).mul_(1 - beta) if gradient else None


def _skew_forward_kl(x: Softened, *, skew: float = 0.1, gradient: bool) -> ValueAndGradient:
    if skew == 0:
        return _forward_kl(x, gradient=gradient)
    gap = _gap_over_mixture(x.p, x.q, skew).mul_(1 - skew)
    value = _skew_kl(x.p, x.q, _log_plus_1(gap.clone()), skew)
    # The slope is (skew - 1) p / mixture, which is this and a constant.
    return value, _centred(x.q, gap.mul_(skew - 1)) if gradient else None


def _skew_reverse_kl(x: Softened, *, skew: float = 0.1, gradient: bool) -> ValueAndGradient:
    if skew == 0:
        return _reverse_kl(x, gradient=gradient)
    gap = _gap_over_mixture(x.q, x.p, skew).mul_(1 - skew)
    log_share = _log_plus_1(gap.clone())
    value = _skew_kl(x.q, x.p, log_share, skew)
    return value, _centred(x.q, log_share.sub_(gap, alpha=skew)) if gradient else None


def _adaptive_kl(x: Softened, *, head_mass: float = 0.5, gradient: bool) -> ValueAndGradient:
    head, tail = adaptive_weights(x.p, x.q, head_mass)
    forward, forward_gradient = _forward_kl(x, gradient=gradient)
    reverse, reverse_gradient = _reverse_kl(x, gradient=gradient)
    # A weight of 0 must hide an infinite value; that of reverse KL is never 0 where it is infinite.
    value = head * forward.masked_fill(head == 0, 0.0) + tail * reverse
    if forward_gradient is None or reverse_gradient is None:
        return value, None
    forward_gradient.mul_(head.unsqueeze(-1))
    return value, reverse_gradient.mul_(tail.unsqueeze(-1)).add_(forward_gradient)


def _total_variation(x: Softened, *, gradient: bool) -> ValueAndGradient:
    gap = torch.sub(x.q, x.p)
    value = gap.abs().sum(-1) / 2
    return value, _centred(x.q, gap.sign_().div_(2)) if gradient else None


def _kl(p: Rows, q: Rows, log_ratio: Rows) -> PerToken:
    r"""KL(p || q) of the ratio log(q / p).

    The sum of q - p, which is 0, is added id by id, as p (exp(ratio) - 1). No term is negative
    then, and an error of the normalisers, which is one of all ratios alike, cancels; without that
    it drowns the difference of models that almost agree. Where q > e p the exponential might
    overflow: it is bounded, and what is missing is added.
    """
    missing = torch.add(q, p, alpha=-math.e).relu_().sum(-1)
    return log_ratio.clamp_max(1).expm1_().sub_(log_ratio).mul_(p).sum(-1) + missing


def _skew_kl(p: Rows, q: Rows, log_share: Rows, skew: float) -> PerToken:
    """KL(p || mixture) of log(p / mixture), with a sum of mixture - p added, as in `_kl`."""
    return (p * log_share).add_(q - p, alpha=1 - skew).sum(-1)


def _gap_over_mixture(p: Rows, q: Rows, weight: float) -> Rows:
    """(p - q) / (`weight` p + (1 - `weight`) q); 0 where both are."""
    mixture = torch.lerp(q, p, weight).clamp_min_(torch.finfo(q.dtype).tiny)
    return torch.div(p - q, mixture, out=mixture)


def _log_plus_1(gap: Rows) -> Rows:
    """log(1 + gap) in place; finite at -1, where it only ever multiplies a probability of 0."""
    return gap.clamp_min_(torch.finfo(gap.dtype).eps - 1).log1p_()


def _centred(q: Rows, slope: Rows) -> Rows:
    """The gradient q (g - <q, g>), in the slope's place."""
    return slope.sub_((q * slope).sum(-1, keepdim=True)).mul_(q)


def _column(values: PerToken, like: Rows) -> Float[Tensor, "block 1"]:
    """One value a row, to be added to the row's ids."""
    return values.to(like.dtype).unsqueeze(-1)


# A partial of one of these functions is called with the partial's own keywords.
CLOSED_FORMS: dict[Callable[..., PerToken], Callable[..., ValueAndGradient]] = {
    forward_kl: _forward_kl,
    reverse_kl: _reverse_kl,
    jsd: _jsd,
    skew_forward_kl: _skew_forward_kl,
    skew_reverse_kl: _skew_reverse_kl,
    adaptive_kl: _adaptive_kl,
    total_variation: _total_variation,
}


def divergence_of(
    x: Softened, divergence: Divergence, temperature: float, *, gradient: bool
) -> ValueAndGradient:
    """A divergence per token, times T^2, and its gradient in the student's logits if wanted.

    By its closed form if it has one, else by autograd.

    Args:
        x: Both models at temperature 1.
        divergence: A function of two logits and a temperature, or a partial of one.
        temperature: T.
        gradient: Whether it is wanted.
    """
    function = divergence
    keywords: dict[str, Any] = {}
    if isinstance(function, functools.partial) and not function.args:
        keywords = function.keywords
        function = function.func
    if (closed_form := CLOSED_FORMS.get(function)) is not None:
        value, slope = closed_form(softened(x, temperature), gradient=gradient, **keywords)
        # T^2 by definition; the softened logits are the logits over T, which takes one T away.
        return temperature**2 * value, None if slope is None else slope.mul_(temperature)
    if not gradient:
        return divergence(x.a, x.b, temperature=temperature), None
    with torch.enable_grad():
        leaf = x.a.detach().requires_grad_()
        kd = divergence(leaf, x.b, temperature=temperature)
        return kd.detach(), torch.autograd.grad(kd.sum(), leaf)[0]


def softened(x: Softened, temperature: float) -> Softened:
    """Models at temperature 1 at another one."""
    if temperature == 1:
        return x
    a, b = x.a / temperature, x.b / temperature
    q, p = a.softmax(-1), b.softmax(-1)
    return Softened(a, b, q, p, log_partition(a.amax(-1), q), log_partition(b.amax(-1), p))


def log_partition(top: PerToken, probabilities: Rows) -> PerToken:
    """Log of the softmax's denominator, from the largest logit and the largest probability.

    The largest probability is `exp(top) / Z`; reading Z off it saves a second pass of exponentials.
    In float64 where the device has it: it is one number a token, and losses are differences of it.
    """
    precise = wide(top.dtype) if top.device.type == "mps" else torch.float64
    return top.to(precise) - probabilities.amax(-1).to(precise).log()
