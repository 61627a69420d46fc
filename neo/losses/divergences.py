"""The divergences as pure functions of logits: the definitions that the fused loss is tested by.

Each takes the logits of student and teacher over the same ids and gives nats per token, times the
square of the temperature, so that the size of the gradient does not shrink as the temperature grows
(Hinton et al. 2015, arXiv:1503.02531, section 2). Each is computed in float32, or in float64 where
an input is float64. Nothing here knows of chunks, ratios or batches.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


def cross_entropy(
    student_logits: Float[Tensor, "tokens vocab"], targets: Int64[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Cross-entropy of the student at the target ids, in nats per token.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
        tensor([0.6931])
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    return F.cross_entropy(student_logits.to(dtype), targets, reduction="none")


def forward_kl(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " tokens"]:
    r"""Forward KL divergence, from teacher to student, in nats per token.

    $T^2\,\mathrm{KL}(p_T \| q_T)$ with $p_T$ and $q_T$ the softmax of the teacher's and of the
    student's logits over $T$. LLM-Neo (2024, arXiv:2411.06839) uses it with $T = 1$. The teacher's
    entropy is part of the value, so it is 0 exactly where the two agree. Ids to which the teacher
    gives no probability add nothing, whatever the student gives them.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> forward_kl(torch.zeros(2, 2), teacher)
        tensor([0.3278, 0.0000])
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl(log_p, log_q)


def reverse_kl(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " tokens"]:
    r"""Reverse KL divergence, from student to teacher, in nats per token.

    $T^2\,\mathrm{KL}(q_T \| p_T)$ with the letters of `forward_kl`. It is infinite where the
    student gives probability to an id that the teacher rules out with a logit of minus infinity.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> reverse_kl(torch.zeros(2, 2), teacher)
        tensor([0.4338, 0.0000])
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl(log_q, log_p)


def jsd(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Float[Tensor, " tokens"]:
    r"""Generalised Jensen-Shannon divergence, in nats per token; symmetric at `beta` 0.5.

    $T^2\,(\beta\,\mathrm{KL}(p \| m) + (1 - \beta)\,\mathrm{KL}(q \| m))$ with
    $m = \beta p + (1 - \beta) q$, teacher $p$ and student $q$: the definition of Agarwal et al.
    2024 (arXiv:2306.13649, section 2). TRL's `generalized_jsd_loss` gives `beta` the same meaning
    in between, but at its ends switches to forward KL (0) and reverse KL (1), without the factor
    $1/\beta$ or $1/(1 - \beta)$ that links them to this function, and never multiplies by $T^2$.
    Here the ends are refused: the value there is 0 for every student.

    Args:
        student_logits: Logits, with gradient.
        teacher_logits: Logits over the same ids, without gradient.
        temperature: Softens both distributions; 1 compares the models as they are.
        beta: Weight of the teacher in the mixture, in (0, 1).

    Example:
        >>> jsd(torch.tensor([[-99.0, 99.0]]), torch.tensor([[99.0, -99.0]]))
        tensor([0.6931])
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta={beta}: must lie in (0, 1); take forward_kl or reverse_kl instead of an end"
        )
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    # The gradient of logaddexp is NaN where both sides are minus infinity.
    finite_log_q = log_q.clamp_min(torch.finfo(log_q.dtype).min / 2)
    log_m = torch.logaddexp(log_p + math.log(beta), finite_log_q + math.log1p(-beta))
    return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def _log_probabilities(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    temperature: float,
) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, "tokens vocab"]]:
    """Log-probabilities of student and teacher at the temperature."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: must be a finite number above 0")
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    log_q = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)
    return log_q, log_p


def _kl(
    log_a: Float[Tensor, "tokens vocab"], log_b: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(a || b) per token in nats, where 0 log 0 is 0 even against minus infinity."""
    a = log_a.exp()
    # Masked before the product: 0 * inf is NaN, in the value and in the gradient.
    return (a * (log_a - log_b).masked_fill(a == 0, 0.0)).sum(-1)
