r"""The divergences as pure functions of logits: the definitions the fused loss is tested by.

Each takes the logits $s$ of the student and $t$ of the teacher over the same ids and gives
$T^2\,D(p, q)$ per token, with $p$ and $q$ the softmax of $t / T$ and $s / T$: nats, but for
`total_variation`. Each is computed in float32, or in float64 where an input is float64. Nothing
here knows of chunks, ratios or batches.

Gradients: with $g = \partial D / \partial q$ the gradient in $s$ is
$T\,q\,(g - \langle q, g \rangle)$, in which constants in $g$ cancel.

Temperature: without its square the gradient would shrink as T grows (Hinton et al. 2015,
arXiv:1503.02531, section 2). With it, a smooth divergence of finite logits tends to
$c\,\mathrm{Var}(t - s)$ over equally weighted ids, with a $c$ of its own: at a high T all of them
are one squared error of logits, to which likely and unlikely ids are the same.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.probabilities import kl, log_mixture, log_probabilities


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
    temperature: float | int = 1.0,
) -> Float[Tensor, " tokens"]:
    r"""Forward KL divergence, from teacher to student, in nats per token.

    $D = \mathrm{KL}(p \| q)$, used by LLM-Neo (2024, arXiv:2411.06839) with $T = 1$. The teacher's
    entropy is part of the value, so it is 0 exactly where the two agree. Ids to which the teacher
    gives no probability add nothing, whatever the student gives them.

    Gradient: $T\,(q - p)$. Large T: $c = 1/2$.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> forward_kl(torch.zeros(2, 2), teacher)
        tensor([0.3278, 0.0000])
    """
    log_q, log_p = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * kl(log_p, log_q)


def reverse_kl(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    *,
    temperature: float | int = 1.0,
) -> Float[Tensor, " tokens"]:
    r"""Reverse KL divergence, from student to teacher, in nats per token.

    $D = \mathrm{KL}(q \| p)$, used by MiniLLM (Gu et al. 2024, arXiv:2306.08543). It is infinite
    where the student gives probability to an id that the teacher rules out with a logit of minus
    infinity.

    Gradient: $T\,q\,(\log(q / p) - D)$. Large T: $c = 1/2$.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> reverse_kl(torch.zeros(2, 2), teacher)
        tensor([0.4338, 0.0000])
    """
    log_q, log_p = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * kl(log_q, log_p)


def jsd(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    *,
    temperature: float | int = 1.0,
    beta: float | int = 0.5,
) -> Float[Tensor, " tokens"]:
    r"""Generalised Jensen-Shannon divergence, in nats per token; symmetric at `beta` 0.5.

    $D = \beta\,\mathrm{KL}(p \| m) + (1 - \beta)\,\mathrm{KL}(q \| m)$ with
    $m = \beta p + (1 - \beta) q$: the definition of GKD (Agarwal et al. 2024, arXiv:2306.13649,
    section 2). At most $-\beta \log \beta - (1 - \beta) \log(1 - \beta)$, which is $\log 2$ at 0.5.

    Gradient: $T\,(1 - \beta)\,q\,(\log(q / m) - \mathrm{KL}(q \| m))$. Large T:
    $c = \beta (1 - \beta) / 2$. `beta` is the teacher's weight in the mixture. As it goes to 0 the
    value over `beta` tends to forward KL, as it goes to 1 the value over `1 - beta` to reverse KL;
    the ends are refused, since the value there is 0 for every student.

    TRL's `generalized_jsd_loss` (1.16.0) gives `beta` the same meaning in between. At its ends it
    switches to forward KL (0) and reverse KL (1), without those factors, and it never multiplies by
    $T^2$.

    Example:
        >>> jsd(torch.tensor([[-99.0, 99.0]]), torch.tensor([[99.0, -99.0]]))
        tensor([0.6931])
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta={beta}: must lie in (0, 1); take forward_kl or reverse_kl instead of an end"
        )
    log_q, log_p = log_probabilities(student_logits, teacher_logits, temperature)
    log_m = log_mixture(log_q, log_p, beta)
    return temperature**2 * (beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m))


def skew_forward_kl(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    *,
    temperature: float | int = 1.0,
    skew: float | int = 0.1,
) -> Float[Tensor, " tokens"]:
    r"""Forward KL to a student mixed with the teacher, in nats per token.

    $D = \mathrm{KL}(p \| m)$ with $m = \alpha p + (1 - \alpha) q$ and `skew` $\alpha$: DistiLLM (Ko
    et al. 2024, arXiv:2402.03898), whose code leaves out the teacher's entropy and has 0.1 as the
    default. At most $-\log \alpha$, however wrong the student is.

    Gradient: $T\,(1 - \alpha)\,q\,(\langle p, q / m \rangle - p / m)$. Large T:
    $c = (1 - \alpha)^2 / 2$. At `skew` 0 it is forward KL; towards 1 it goes to 0 for every
    student, and 1 is refused.

    Example:
        >>> skew_forward_kl(torch.tensor([[-99.0, 99.0]]), torch.tensor([[99.0, -99.0]]))
        tensor([2.3026])
    """
    _check_skew(skew)
    log_q, log_p = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * kl(log_p, log_mixture(log_q, log_p, skew))


def skew_reverse_kl(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    *,
    temperature: float | int = 1.0,
    skew: float | int = 0.1,
) -> Float[Tensor, " tokens"]:
    r"""Reverse KL to a teacher mixed with the student, in nats per token.

    $D = \mathrm{KL}(q \| m)$ with $m = (1 - \alpha) p + \alpha q$ and `skew` $\alpha$: DistiLLM (Ko
    et al. 2024, arXiv:2402.03898), whose code has 0.1 as the default. At most $-\log \alpha$, so
    that a teacher may rule ids out.

    Gradient: $T\,q\,(g - \langle q, g \rangle)$ with $g = \log(q / m) - \alpha q / m$. Large T:
    $c = (1 - \alpha)^2 / 2$. At `skew` 0 it is reverse KL; towards 1 it goes to 0 for every
    student, and 1 is refused.

    Example:
        >>> skew_reverse_kl(torch.tensor([[-99.0, 99.0]]), torch.tensor([[99.0, -99.0]]))
        tensor([2.3026])
    """
    _check_skew(skew)
    log_q, log_p = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * kl(log_q, log_mixture(log_p, log_q, skew))


def adaptive_kl(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    *,
    temperature: float | int = 1.0,
    head_mass: float | int = 0.5,
) -> Float[Tensor, " tokens"]:
    r"""Forward and reverse KL, weighted token by token, in nats per token.

    $D = w\,\mathrm{KL}(p \| q) + (1 - w)\,\mathrm{KL}(q \| p)$ with the $w$ of `adaptive_weights`:
    AKL (Wu et al. 2024, arXiv:2404.02657). Where the two differ on the teacher's likely ids forward
    KL counts, where they differ on the others reverse KL does. As in the authors' code $w$ is a
    constant for the gradient, and it is taken from both distributions at the temperature.

    Gradient: $T\,(w\,(q - p) + (1 - w)\,q\,(\log(q / p) - \mathrm{KL}(q \| p)))$. Large T:
    $c = 1/2$. Towards a `head_mass` of 0 the head is the most likely id alone; towards 1 it is all
    ids but the least likely, which is almost forward KL. The ends are refused.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> adaptive_kl(torch.zeros(2, 2), teacher)
        tensor([0.3808, 0.0000])
    """
    log_q, log_p = log_probabilities(student_logits, teacher_logits, temperature)
    head, tail = adaptive_weights(log_p.exp(), log_q.exp(), head_mass)
    # A weight of 0 must hide an infinite value, which a product with 0 would turn into NaN. The
    # weight of reverse KL is never 0 where that is infinite.
    forward = kl(log_p, log_q).masked_fill(head == 0, 0.0)
    return temperature**2 * (head * forward + tail * kl(log_q, log_p))


def adaptive_weights(
    p: Float[Tensor, "tokens vocab"], q: Float[Tensor, "tokens vocab"], head_mass: float | int
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Weights of forward and of reverse KL in `adaptive_kl`, which add up to 1 per token.

    They are the shares of head and tail in the sum over ids of |p - q|, without gradient; one half
    each where that sum is 0. The head is what the authors' code takes (wutaiqiang/LLM_KD_AKL): the
    most likely ids of the teacher `p` as long as they add up to at most `head_mass`, in (0, 1), and
    always the first of them. (KDFlow's head includes the id that crosses 0.5.) Equal probabilities
    may fall either way.
    """
    if not 0 < head_mass < 1:
        raise ValueError(f"head_mass={head_mass}: must lie in (0, 1); take forward_kl instead of 1")
    p, q = p.detach(), q.detach()
    vocab = p.shape[-1]
    # Most teachers' heads are a few ids: finding those takes a fraction of sorting all.
    k = min(64, vocab)
    top, ids = p.topk(k, dim=-1)
    while k < vocab and not (top.sum(-1) > head_mass).all():
        k = min(8 * k, vocab)
        top, ids = p.topk(k, dim=-1)
    # An id without probability lies past all mass, which rounding may leave a little below 1.
    in_tail = (top.cumsum(-1) > head_mass) | (top == 0)
    in_tail[:, 0] = False
    gap = (p - q).abs()
    top_gap = gap.gather(-1, ids)
    head = top_gap.masked_fill(in_tail, 0.0).sum(-1)
    tail = gap.scatter_(-1, ids, top_gap.masked_fill(~in_tail, 0.0)).sum(-1)
    total = head + tail
    some = total > 0
    return torch.where(some, head / total, 0.5), torch.where(some, tail / total, 0.5)


def total_variation(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    *,
    temperature: float | int = 1.0,
) -> Float[Tensor, " tokens"]:
    r"""Total variation distance per token times $T^2$: a probability, not nats.

    $D = \frac12 \sum_i |p_i - q_i|$, the largest difference between the two that any set of ids
    shows; in [0, 1], symmetric. f-DISTILL (Wen et al. 2023, arXiv:2307.15190) distils with it.

    Gradient: $T\,q\,(g - \langle q, g \rangle)$ with $g = \frac12 \mathrm{sign}(q - p)$, which
    jumps where they agree and vanishes where a student is sure of the wrong id. Large T: no limit.
    The value grows like $T / 2$ times the mean absolute deviation of $t - s$ over equally weighted
    ids, the gradient like $T$: compare values of one T only, and lower `kd_ratio` as T grows.

    Example:
        >>> total_variation(torch.zeros(1, 2), torch.tensor([[-99.0, 99.0]]))
        tensor([0.5000])
    """
    log_q, log_p = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def _check_skew(skew: float | int) -> None:
    """Raise where a mixture of weight `skew` would have nothing left of the other model."""
    if not 0 <= skew < 1:
        raise ValueError(
            f"skew={skew}: must lie in [0, 1); 0 is the plain divergence, at 1 it is 0 for everyone"
        )
