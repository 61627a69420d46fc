"""The optimizer and its schedule, as a spec and two pure functions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with a warm-up and a decay.

    Args:
        lr: The highest learning rate of the run.
        base_lr: The full-parameter rate that `lr` is a multiple of; kept for the record.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Of matrices; vectors (norms, biases) never decay.
        schedule: How the rate falls after the warm-up: cosine, linear (both to 0), constant.
        warmup_ratio: Share of the run over which the rate rises from 0.
    """

    lr: float
    base_lr: float | None = None
    betas: tuple[float, ...] | list[float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_ratio: float = 0.1

    def __post_init__(self) -> None:
        problems = []
        if not (self.lr > 0 and math.isfinite(self.lr)):
            problems.append(f"optim.lr={self.lr}: must be a finite number above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"optim.betas={list(self.betas)}: must be two numbers in [0, 1)")
        if self.eps <= 0:
            problems.append(f"optim.eps={self.eps}: must be above 0")
        if self.weight_decay < 0:
            problems.append(f"optim.weight_decay={self.weight_decay}: must not be negative")
        if self.schedule not in SCHEDULES:
            problems.append(
                f"optim.schedule={self.schedule!r}: must be one of {', '.join(SCHEDULES)}"
            )
        if not 0 <= self.warmup_ratio < 1:
            problems.append(f"optim.warmup_ratio={self.warmup_ratio}: must lie in [0, 1)")
        if problems:
            raise ValueError("\n".join(problems))

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
        """The optimizer over the given parameters, vectors in a group without weight decay."""
        matrices = [p for p in parameters.values() if p.ndim >= 2]
        vectors = [p for p in parameters.values() if p.ndim < 2]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((matrices, self.weight_decay), (vectors, 0.0))
            if group
        ]
        return torch.optim.AdamW(
            groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps
        )

    def rate(self, progress: float) -> float:
        """The learning rate at a point of the run, 0 its beginning and 1 its end.

        Example:
            >>> [round(AdamW(lr=1.0, warmup_ratio=0.5).rate(p), 9) for p in (0.0, 0.25, 0.5, 1.0)]
            [0.0, 0.5, 1.0, 0.0]
        """
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup_ratio:
            return self.lr * progress / self.warmup_ratio
        if self.schedule == "constant":
            return self.lr
        left = (1 - progress) / (1 - self.warmup_ratio)
        return self.lr * (
            left if self.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
        )
