"""Closed forms: a divergence per token and its gradient, from probabilities at the temperature.

The definitions, with the formulas of these gradients, stand in `neo.losses.divergences`; these are
the same numbers without autograd, whose graph would hold every intermediate of a block. Gradients
are in the softened logits: where a divergence has the slope g in the student's probabilities q,
they are q (g - <q, g>), blind to a constant in g.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

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

    def log_p_over_q(self) -> Rows:
        """log(p / q) per id; minus infinity where the teacher rules an id out."""
        # Subtracting the logits first loses nothing where they are close.
        return torch.sub(self.b, self.a).add_(_column(self.log_z_a - self.log_z_b, self.a))


def _forward_kl(x: Softened, *, gradient: bool) -> ValueAndGradient:
    # Where p = 0 a finite ratio will do, and 0 * inf is NaN.
    ratio = x.log_p_over_q().clamp_min_(torch.finfo(x.p.dtype).min)
    return _kl(x.p, x.q, ratio), torch.sub(x.q, x.p) if gradient else None


def _reverse_kl(x: Softened, *, gradient: bool) -> ValueAndGradient:
    # Infinite where the teacher rules an id out, unless the student gives it nothing either.
    slope = x.log_p_over_q().neg_().masked_fill_(x.q == 0, 0.0)
    value = _kl(x.q, x.p, slope)
    return value, _centred(x.q, slope) if gradient else None


def _jsd(x: Softened, *, beta: float = 0.5, gradient: bool) -> ValueAndGradient:
    mixture = _mixture(x.q, x.p, beta)
    of_teacher = _log(x.p / mixture).mul_(x.p).sum(-1)
    slope = _log(torch.div(x.q, mixture, out=mixture))
    of_student = (x.q * slope).sum(-1)
    value = beta * of_teacher + (1 - beta) * of_student
    return value, _centred(x.q, slope).mul_(1 - beta) if gradient else None


def _skew_forward_kl(x: Softened, *, skew: float = 0.1, gradient: bool) -> ValueAndGradient:
    if skew == 0:
        return _forward_kl(x, gradient=gradient)
    share = torch.div(x.p, _mixture(x.q, x.p, skew))
    slope = share * (skew - 1) if gradient else None
    value = _log(share).mul_(x.p).add_(x.q - x.p, alpha=1 - skew).sum(-1)
    return value, None if slope is None else _centred(x.q, slope)


def _skew_reverse_kl(x: Softened, *, skew: float = 0.1, gradient: bool) -> ValueAndGradient:
    if skew == 0:
        return _reverse_kl(x, gradient=gradient)
    share = torch.div(x.q, _mixture(x.p, x.q, skew))
    log_share = _log(share.clone())
    value = (x.q * log_share).add_(x.p - x.q, alpha=1 - skew).sum(-1)
    return value, _centred(x.q, log_share.sub_(share, alpha=skew)) if gradient else None


def _adaptive_kl(x: Softened, *, head_mass: float = 0.5, gradient: bool) -> ValueAndGradient:
    head, tail = adaptive_weights(x.p, x.q, head_mass)
    forward, forward_gradient = _forward_kl(x, gradient=gradient)
    reverse, reverse_gradient = _reverse_kl(x, gradient=gradient)
    # The weight of reverse KL is never 0 where that is infinite.
    value = head * forward + tail * reverse
    if forward_gradient is None or reverse_gradient is None:
        return value, None
    forward_gradient.mul_(head.unsqueeze(-1))
    return value, reverse_gradient.mul_(tail.unsqueeze(-1)).add_(forward_gradient)


def _total_variation(x: Softened, *, gradient: bool) -> ValueAndGradient:
    gap = torch.sub(x.q, x.p)
    value = gap.abs().sum(-1) / 2
    return value, _centred(x.q, gap.sign_().div_(2)) if gradient else None


def _kl(p: Rows, q: Rows, log_ratio: Rows) -> PerToken:
    r"""KL(p || q) of the ratio log(p / q).

    The sum of q - p, which is 0, is added id by id, as p (exp(-ratio) - 1). No term is negative
    then, and an error of the normalisers, which is one of all ratios alike, cancels; without that
    it drowns the difference of models that almost agree. Where q > e p the exponential might
    overflow: it is bounded, and what is missing is added.
    """
    missing = torch.add(q, p, alpha=-math.e).relu_()
    terms = log_ratio.clamp_min(-1).neg_().expm1_().add_(log_ratio).mul_(p)
    return terms.add_(missing).sum(-1)


def _mixture(a: Rows, b: Rows, weight: float) -> Rows:
    """`(1 - weight) a + weight b`; above 0, so that 0 may be divided by it."""
    return torch.lerp(a, b, weight).clamp_min_(torch.finfo(a.dtype).tiny)


def _log(share: Rows) -> Rows:
    """The logarithm in place; finite at 0, which only ever multiplies 0."""
    return share.clamp_min_(torch.finfo(share.dtype).tiny).log_()


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
