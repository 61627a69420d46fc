"""The logits of one chunk of tokens -> its sums, and in their place the gradient of the loss.

A divergence of `neo.losses.gradients` has its gradient written out; any other function of two
logits is differentiated by autograd, on a few tokens' logits alone.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.distillation import Distillation, Divergence
from neo.losses.gradients import CLOSED_FORMS, PerToken, Rows, Softened
from neo.losses.products import wide

# Elements of logits that are worked on at a time: on a CPU all passes over them then stay within
# its cache; a GPU is better served by few large launches.
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
# The kind of device whose sizes are taken, where that is not the tensors' own.
_planned_for: ContextVar[str | None] = ContextVar("planned_for", default=None)


@contextmanager
def sized_for(device_type: str) -> Iterator[None]:
    """Within it chunks and blocks have the sizes of a kind of device, wherever the tensors lie.

    A plan is made with tensors without data, which cannot pretend to lie on a GPU.
    """
    token = _planned_for.set(device_type)
    try:
        yield
    finally:
        _planned_for.reset(token)


def kind_of(device: torch.device) -> str:
    """The kind of device whose sizes are taken for tensors that lie on this one."""
    return _planned_for.get() or device.type


class ChunkSums:
    """Sums that grow chunk by chunk; without a teacher all but two stay 0."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        def zero(dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        self.ce, self.student_entropy = zero(), zero()
        self.kd, self.teacher_target, self.teacher_mass_out = zero(), zero(), zero()
        self.agree = zero(torch.int64)


def block_rows(vocab: int, device: torch.device) -> int:
    """How many tokens are worked on at a time, at least one."""
    return max(1, BLOCK_ELEMENTS.get(kind_of(device), BLOCK_ELEMENTS["cuda"]) // vocab)


def differentiate_chunk(
    student_logits: Float[Tensor, "chunk vocab"],
    teacher_logits: Float[Tensor, "chunk vocab"] | None,
    targets: Int64[Tensor, " chunk"],
    spec: Distillation,
    sums: ChunkSums,
    *,
    gradient: bool,
    softcap: float | None = None,
    outside: Float[Tensor, " chunk"] | None = None,
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
        outside: Log of the summed exponentials of the teacher's logits on ids that are not shared;
            None where there are none.
    """
    chunk, vocab = student_logits.shape
    rows = block_rows(vocab, student_logits.device)
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
            outside=None if outside is None else outside[block],
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
    outside: PerToken | None,
) -> None:
    """`differentiate_chunk` for a few rows."""
    ratio = float(spec.kd_ratio)
    q = s.softmax(-1)
    top = s.amax(-1)
    log_z = _log_partition(top, q)
    sums.ce += (log_z - s.gather(-1, targets).squeeze(-1)).sum()
    sums.student_entropy += (log_z - (q * s).sum(-1)).sum()

    kd_gradient = None
    if t is not None:
        p = t.softmax(-1)
        teacher_top = t.amax(-1)
        teacher_log_z = _log_partition(teacher_top, p)
        sums.teacher_target += p.gather(-1, targets).sum()
        if outside is not None:
            sums.teacher_mass_out += torch.sigmoid(outside - teacher_log_z).sum()
        # Where no id is both models' top, no sum of their logits is the sum of the tops. An argmax
        # would tell the same and costs a CPU several times as long.
        sums.agree += ((s + t).amax(-1) == top + teacher_top).sum()
        softened = Softened(s, t, q, p, log_z, teacher_log_z)
        kd, kd_gradient = _divergence(softened, spec, gradient=gradient and ratio > 0)
        sums.kd += kd.sum()
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


def _divergence(x: Softened, spec: Distillation, *, gradient: bool) -> tuple[PerToken, Rows | None]:
    """The divergence per token and, if wanted, its gradient in the student's logits.

    `x` is at temperature 1.
    """
    function: Divergence = spec.divergence
    temperature = float(spec.temperature)
    keywords: dict[str, Any] = {}
    if isinstance(function, functools.partial) and not function.args:
        keywords = function.keywords
        function = function.func
    if (closed_form := CLOSED_FORMS.get(function)) is not None:
        value, slope = closed_form(_soften(x, temperature), gradient=gradient, **keywords)
        # T^2 by definition; the softened logits are the logits over T, which takes one T away.
        return temperature**2 * value, None if slope is None else slope.mul_(temperature)
    if not gradient:
        return spec.divergence(x.a, x.b, temperature=temperature), None
    with torch.enable_grad():
        leaf = x.a.detach().requires_grad_()
        kd = spec.divergence(leaf, x.b, temperature=temperature)
        return kd.detach(), torch.autograd.grad(kd.sum(), leaf)[0]


def _soften(x: Softened, temperature: float) -> Softened:
    """The same models at another temperature."""
    if temperature == 1:
        return x
    a, b = x.a / temperature, x.b / temperature
    q, p = a.softmax(-1), b.softmax(-1)
    return Softened(a, b, q, p, _log_partition(a.amax(-1), q), _log_partition(b.amax(-1), p))


def _log_partition(top: PerToken, probabilities: Rows) -> PerToken:
    """Log of the softmax's denominator, from the largest logit and the largest probability.

    The largest probability is `exp(top) / Z`; reading Z off it saves a second pass of exponentials.
    In float64 where the device has it: it is one number a token, and losses are differences of it.
    """
    precise = wide(top.dtype) if top.device.type == "mps" else torch.float64
    return top.to(precise) - probabilities.amax(-1).to(precise).log()
