"""What divergences are made of: log-probabilities at a temperature, mixtures, entropy, and KL.

All keep their digits where two models almost agree, and stay numbers where one rules ids out.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def entropy(logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """Entropy of a model's distribution, in nats per token; ids without probability add nothing.

    Example:
        >>> entropy(torch.zeros(1, 2))
        tensor([0.6931])
    """
    log_p = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)


def log_probabilities(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    temperature: float | int,
) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, "tokens vocab"]]:
    """Log-probabilities of student and teacher at the temperature."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: must be a finite number above 0")
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    log_q = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)
    return log_q, log_p


def log_mixture(
    log_a: Float[Tensor, "tokens vocab"], log_b: Float[Tensor, "tokens vocab"], weight: float | int
) -> Float[Tensor, "tokens vocab"]:
    """Log of `(1 - weight) * a + weight * b`, for a weight in [0, 1)."""
    if weight == 0:
        return log_a
    # The gradient of logaddexp is NaN where both sides are minus infinity.
    log_a = log_a.clamp_min(torch.finfo(log_a.dtype).min / 2)
    return torch.logaddexp(log_a + math.log1p(-weight), log_b + math.log(weight))


def kl(
    log_a: Float[Tensor, "tokens vocab"], log_b: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(a || b) per token in nats, where 0 log 0 is 0 even against minus infinity.

    The sum of b - a, which is 0, is added id by id: no term is negative then, and what rounding did
    to the two normalisers cancels, which else drowns the difference of models that almost agree.
    """
    a, b = log_a.exp(), log_b.exp()
    # Masked before the product: 0 * inf is NaN, in the value and in the gradient.
    gap = (log_a - log_b).masked_fill(a == 0, 0.0)
    near = gap.clamp(-1.0, 1.0)
    is_near = (gap == near) & (a > 0)
    return torch.where(is_near, a * (near + torch.expm1(-near)), a * gap - a + b).sum(-1)
