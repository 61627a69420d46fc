"""The logits of one chunk of tokens -> its sums, and in their place the gradient of the loss.

A divergence found in `CLOSED_FORMS` has its gradient written out; any other function of two logits
is differentiated by autograd, on the chunk's logits alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.distillation import Distillation, Divergence
from neo.losses.divergences import forward_kl

# Elements of logits that are worked on at a time: on a CPU all passes over them then stay within
# its cache; a GPU is better served by few large launches.
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}

Rows = Float[Tensor, "block vocab"]
PerToken = Float[Tensor, " block"]


class ChunkSums:
    """Sums that grow chunk by chunk; without a teacher its three stay 0."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.ce = torch.zeros((), dtype=dtype, device=device)
        self.kd = torch.zeros((), dtype=dtype, device=device)
        self.agree = torch.zeros((), dtype=torch.int64, device=device)
        self.teacher_mass_out = torch.zeros((), dtype=dtype, device=device)


def differentiate_chunk(
    student_logits: Float[Tensor, "chunk vocab"],
    teacher_logits: Float[Tensor, "chunk vocab"] | None,
    targets: Int64[Tensor, " chunk"],
    spec: Distillation,
    sums: ChunkSums,
    *,
    gradient: bool,
    softcap: float | None,
) -> None:
    """Add the chunk to `sums`; with `gradient`, put the loss's gradient in the logits' place.

    Args:
        student_logits: Over the shared ids, in float32 or float64; destroyed.
        teacher_logits: Over the same ids; None where there is no teacher to compare with.
        targets: The id each token must predict.
        spec: Divergence, ratio and temperature.
        sums: What grows.
        gradient: Whether the gradient is wanted.
        softcap: The bound that was put on the student's logits; the gradient is then that of the
            logits before it.
    """
    chunk, vocab = student_logits.shape
    elements = BLOCK_ELEMENTS.get(student_logits.device.type, BLOCK_ELEMENTS["cuda"])
    rows = max(1, elements // vocab)
    for start in range(0, chunk, rows):
        block = slice(start, start + rows)
        _differentiate_block(
            student_logits[block],
            None if teacher_logits is None else teacher_logits[block],
            targets[block].unsqueeze(-1),
            spec,
            sums,
            gradient=gradient,
            softcap=softcap,
        )


def _differentiate_block(
    s: Rows,
    t: Rows | None,
    targets: Int64[Tensor, "block 1"],
    spec: Distillation,
    sums: ChunkSums,
    *,
    gradient: bool,
    softcap: float | None,
) -> None:
    """`differentiate_chunk` for a few rows."""
    ratio = spec.kd_ratio
    q = s.softmax(-1)
    top = s.amax(-1)
    sums.ce += (_log_partition(top, q) - s.gather(-1, targets).squeeze(-1)).sum()

    kd_gradient = None
    if t is not None:
        kd, kd_gradient = _divergence(s, t, q, spec, gradient=gradient and ratio > 0)
        sums.kd += kd.sum()
        # Where no id is both models' top, no sum of their logits is the sum of the tops. An argmax
        # would tell the same and costs a CPU twenty times as long.
        sums.agree += ((s + t).amax(-1) == top + t.amax(-1)).sum()
    if not gradient:
        return

    slope = None if softcap is None else (s / softcap).square_().neg_().add_(1)
    if kd_gradient is None:
        s.copy_(q)
        ratio = 0.0
    else:
        torch.lerp(q, kd_gradient, ratio, out=s)
    s.scatter_add_(-1, targets, s.new_full((), ratio - 1).expand_as(targets))
    if slope is not None:
        s.mul_(slope)


def _divergence(
    s: Rows, t: Rows, q: Rows, spec: Distillation, *, gradient: bool
) -> tuple[PerToken, Rows | None]:
    """The divergence per token in nats and, if wanted, its gradient in the student's logits.

    `q` is the student's softmax at temperature 1, which closed forms may use and must not change.
    """
    function: Divergence = spec.divergence
    temperature = float(spec.temperature)
    keywords: dict[str, Any] = {}
    if isinstance(function, functools.partial) and not function.args:
        keywords = function.keywords
        function = function.func
    closed_form = CLOSED_FORMS.get(function)
    if closed_form is not None:
        return closed_form(s, t, q, temperature=temperature, gradient=gradient, **keywords)
    if not gradient:
        return spec.divergence(s, t, temperature=temperature), None
    with torch.enable_grad():
        leaf = s.detach().requires_grad_()
        kd = spec.divergence(leaf, t, temperature=temperature)
        return kd.detach(), torch.autograd.grad(kd.sum(), leaf)[0]


def _forward_kl(
    s: Rows, t: Rows, q: Rows, *, temperature: float, gradient: bool
) -> tuple[PerToken, Rows | None]:
    r"""`forward_kl` and its gradient, $T\,(q_T - p_T)$ with softmax over T.

    The value is $T^2 (\sum_i p_i (t_i - s_i) / T - \log Z_t + \log Z_s)$.
    """
    if temperature == 1:
        p = t.softmax(-1)
    else:
        q, p = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
    log_z_s = _log_partition(s.amax(-1) / temperature, q)
    log_z_t = _log_partition(t.amax(-1) / temperature, p)
    # Where the teacher rules an id out, the difference is infinite, and 0 * inf would be NaN.
    bound = torch.finfo(t.dtype).max
    inner = torch.sub(t, s).clamp_(-bound, bound).mul_(p).sum(-1) / temperature
    kd = temperature**2 * (inner - log_z_t + log_z_s)
    if not gradient:
        return kd, None
    difference = torch.sub(q, p, out=p)
    return kd, difference if temperature == 1 else difference.mul_(temperature)


def _log_partition(top: PerToken, probabilities: Rows) -> PerToken:
    """Log of the softmax's denominator, from the largest logit and the largest probability.

    The largest probability is `exp(top) / Z`; reading Z off it saves a second pass of exponentials.
    """
    return top - probabilities.amax(-1).log()


# Functions of `neo.losses.divergences` whose value and gradient are written out here. Called with
# the function's own keywords, so that a partial of it stays in closed form.
ClosedForm = Callable[..., tuple[PerToken, Rows | None]]
CLOSED_FORMS: dict[Divergence, ClosedForm] = {forward_kl: _forward_kl}
