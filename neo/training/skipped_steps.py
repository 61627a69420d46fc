"""Optimizer steps that are left out because their loss or gradient is no number."""

import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from neo.losses.distillation import TokenSums

NUM_SHOWN = 50  # row ids in a message


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number, more often than the run allows."""


class SkippedSteps:
    """Leaves a step out, on all processes alike, if its loss or gradient is NaN or infinite.

    Weights, moments and the optimizer's own step count stay as they were; the rows of the step are
    gone through but not trained on. Whether a step is sound is known on the host before the
    optimizer runs: one wait for the device per optimizer step, and between several processes one
    sum of a number.

    Args:
        most: So many in a run (over all its resumes) are put up with; one more ends it. They are
            counted in total and not in a row, because each is a batch the run never learns from.

    Attributes:
        num: How many there were.
    """

    def __init__(self, most: int) -> None:
        self.most, self.num = most, 0
        self.batches: list[tuple[Sequence[int], TokenSums]] = []  # of the step under way
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)

    def add(self, row_ids: Sequence[int], sums: TokenSums) -> None:
        """Counts a micro-batch to the step under way."""
        self.batches.append((row_ids, sums))

    def must_skip(
        self, trainer: L.Trainer, parameters: Sequence[nn.Parameter], norm: Float[Tensor, ""]
    ) -> bool:
        """Whether this step is left out; then its gradients are gone, and so is what was added.

        Raises:
            DivergedError: One too many.
        """
        batches, self.batches = self.batches, []
        losses = torch.stack([sums.loss for _, sums in batches])
        # Where a scaler looks for the largest scale that does not overflow (fp16), infinite
        # gradients are its daily work: it leaves such steps out by itself.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        sound = losses.isfinite().all() & (norm.isfinite() | scaled)
        if not trainer.strategy.reduce_boolean_decision(not bool(sound), all=False):
            return False
        for parameter in parameters:
            parameter.grad = None  # which every optimizer of torch, and clipping, passes over
        self.num += 1
        text = _describe(trainer, batches, float(norm))
        if self.num > self.most:
            raise DivergedError(
                f"{text}. That is {self.num} steps without a sound gradient, and "
                f"max_skipped_steps={self.most}"
            )
        if trainer.is_global_zero:
            self.console.print(f"{text}. The step is skipped ({self.num} of at most {self.most})")
        return True

    def check_end(self, trainer: L.Trainer) -> None:
        """Refuses to call a run trained that never was.

        Raises:
            DivergedError: Every step was skipped.
        """
        if self.num and self.num >= trainer.global_step:
            raise DivergedError(
                f"all {self.num} steps of the run were skipped: their loss or gradient was no "
                "number, so that nothing was trained"
            )


def gradient_norm(gradients: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The 2-norm of all gradients together, the same on every process where they are sharded."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _describe(
    trainer: L.Trainer, batches: Sequence[tuple[Sequence[int], TokenSums]], norm: float
) -> str:
    """What was no number, and in which rows: those of the micro-batches at fault, if it is known.

    All processes call it together, and each says the same.
    """
    found: tuple[list[str], list[int], list[int]] = ([], [], [])
    for ids, sums in batches:
        found[2].extend(ids)
        if not bool(sums.loss.isfinite()):
            found[0].append(_values(sums))
            found[1].extend(ids)
    everyones: list[Any] = [found]
    if dist.is_available() and dist.is_initialized():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, found)
    values = [value for of_rank, _, _ in everyones for value in of_rank]
    which = 1 if values else 2
    rows = [row for of_rank in everyones for row in of_rank[which]]
    shown = ", ".join(map(str, rows[:NUM_SHOWN])) or "unknown"
    more = f" and {len(rows) - NUM_SHOWN} more" if len(rows) > NUM_SHOWN else ""
    what = values[0] if values else "the loss is a number"
    return (
        f"step {trainer.global_step}: {what}, the norm of the gradient {norm:g}, "
        f"in rows {shown}{more}"
    )


def _values(sums: TokenSums) -> str:
    """The losses of a micro-batch, in nats per supervised token."""
    tokens = max(1, int(sums.tokens))
    named = {"train/loss": sums.loss, "train/ce": sums.ce, "train/kd": sums.kd}
    return ", ".join(
        f"{name} {float(value) / tokens:g}" for name, value in named.items() if value is not None
    )
