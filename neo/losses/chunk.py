"""The logits of one chunk of tokens -> its sums, and in their place the gradient of the loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.comparisons import Comparison, StudentBlock
from neo.losses.distillation import Distillation
from neo.losses.gradients import Rows, log_partition

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
    teacher: Comparison | None,
    targets: Int64[Tensor, " chunk"],
    spec: Distillation,
    sums: ChunkSums,
    *,
    gradient: bool,
    softcap: float | None = None,
) -> None:
    """Add the chunk to `sums`; with `gradient`, put the loss's gradient in the logits' place.

    Args:
        student_logits: Over the shared ids, in float32 or float64; destroyed.
        teacher: Its numbers for the same tokens; None where there is none to compare with.
        targets: The id each token must predict.
        spec: Divergence, ratio and temperature.
        sums: What grows.
        gradient: Whether the gradient is wanted.
        softcap: The bound that was put on the student's logits; the gradient is then that of the
            logits before it.
    """
    chunk, vocab = student_logits.shape
    rows = block_rows(vocab, student_logits.device)
    for start in range(0, chunk, rows):
        block = slice(start, start + rows)
        _differentiate_block(
            student_logits[block],
            None if teacher is None else teacher.at(block),
            targets[block].unsqueeze(-1),
            spec,
            sums,
            gradient=gradient,
            softcap=softcap,
        )


def _differentiate_block(
    s: Rows,
    teacher: Comparison | None,
    targets: Int64[Tensor, "block 1"],
    spec: Distillation,
    sums: ChunkSums,
    *,
    gradient: bool,
    softcap: float | None,
) -> None:
    """`differentiate_chunk` for a few rows."""
    ratio = float(spec.kd_ratio)
    q, top = s.softmax(-1), s.amax(-1)
    log_z = log_partition(top, q)
    sums.ce += (log_z - s.gather(-1, targets).squeeze(-1)).sum()
    sums.student_entropy += (log_z - (q * s).sum(-1)).sum()

    kd_gradient = None
    if teacher is not None:
        student = StudentBlock(s, q, top, log_z)
        found = teacher.against(student, targets, spec, gradient=gradient and ratio > 0)
        sums.kd += found.kd.sum()
        sums.agree += found.agree
        sums.teacher_target += found.target
        sums.teacher_mass_out += found.mass_out
        kd_gradient = found.gradient
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
