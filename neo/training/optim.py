"""The optimizer and its schedule, as a spec and two pure functions."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

SCHEDULES = ("cosine", "linear", "constant")
# The rate of a branch on the embedding under LoRA+, in the code of its authors and in PEFT.
LORAPLUS_LR_EMBEDDING = 1e-6
EMBEDDING = frozenset({"lora_embedding_A", "lora_embedding_B"})
# What a norm is called in transformers: norm, norm1, q_norm, input_layernorm, norm_f; ln_f.
_NORM = re.compile(r"norm\d*$|norm_|^ln(_|\d|$)")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with a warm-up and a decay.

    Args:
        lr: The highest learning rate of the run.
        base_lr: The full-parameter rate that `lr` is a multiple of; kept for the record.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Of matrices; norms, biases and DoRA's magnitudes never decay.
        schedule: How the rate falls after the warm-up: cosine, linear (both to 0), constant.
        warmup_ratio: Share of the run over which the rate rises from 0.
        loraplus_lr_ratio: The rate of B, and of what is a vector, as a multiple of `lr`
            (LoRA+, Hayou et al. 2024, arXiv:2402.12354); None trains all of a branch at `lr`.
        loraplus_lr_embedding: The highest rate of a branch on the embedding under LoRA+; 1e-6
            where it is None.
    """

    lr: float
    base_lr: float | None = None
    betas: tuple[float, ...] | list[float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_ratio: float = 0.1
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float | None = None

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
        for key in ("loraplus_lr_ratio", "loraplus_lr_embedding"):
            value = getattr(self, key)
            if value is not None and not (value > 0 and math.isfinite(value)):
                problems.append(f"optim.{key}={value}: must be a finite number above 0, or null")
        if self.loraplus_lr_embedding is not None and self.loraplus_lr_ratio is None:
            problems.append(
                f"optim.loraplus_lr_embedding={self.loraplus_lr_embedding}: is a rate of LoRA+; "
                "set optim.loraplus_lr_ratio as well"
            )
        if problems:
            raise ValueError("\n".join(problems))

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
        """The optimizer over the given parameters, those of one rate and decay in one group.

        Raises:
            ValueError: A group that was asked for would be empty.
        """
        self.check({name: tuple(parameter.shape) for name, parameter in parameters.items()})
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            decay = self.weight_decay if decays(name, parameter.ndim) else 0.0
            groups.setdefault((self.peak_lr(name, parameter.ndim), decay), []).append(parameter)
        return torch.optim.AdamW(
            [
                {"params": members, "lr": lr, "peak_lr": lr, "weight_decay": decay}
                for (lr, decay), members in groups.items()
            ],
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
        )

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that every group that was asked for has a parameter in it.

        Args:
            shapes: Of everything that is trained, by name.

        Raises:
            ValueError: One has none; names what was asked for, and what is trained.
        """
        parts = {part for name in shapes for part in name.split(".")}
        problems = []
        if self.loraplus_lr_ratio is not None and not {"lora_A", "lora_B"} <= parts:
            problems.append(
                f"optim.loraplus_lr_ratio={self.loraplus_lr_ratio}: is the rate of lora_B over "
                "that of lora_A, and not both are trained"
            )
        if self.loraplus_lr_embedding is not None and not parts & EMBEDDING:
            problems.append(
                f"optim.loraplus_lr_embedding={self.loraplus_lr_embedding}: no branch on an "
                "embedding (lora_embedding_A, lora_embedding_B) is trained"
            )
        if self.weight_decay > 0 and not any(decays(n, len(s)) for n, s in shapes.items()):
            problems.append(
                f"optim.weight_decay={self.weight_decay}: no matrix is trained, and norms, biases "
                "and magnitudes do not decay"
            )
        if problems:
            there_are = f"; trained are: {', '.join(_kinds(shapes)) or 'no parameters'}"
            raise ValueError("\n".join(problem + there_are for problem in problems))

    def peak_lr(self, name: str, ndim: int) -> float:
        """The highest learning rate of a parameter, given its name and number of dimensions.

        Under LoRA+ it is grouped as PEFT and the authors' code do: vectors learn at B's rate too.

        Example:
            >>> spec = AdamW(lr=0.5, loraplus_lr_ratio=16.0)
            >>> [spec.peak_lr(f"q_proj.lora_{x}.default.weight", 2) for x in "AB"]
            [0.5, 8.0]
        """
        if self.loraplus_lr_ratio is None:
            return self.lr
        parts = set(name.split("."))
        if parts & EMBEDDING:
            given = self.loraplus_lr_embedding
            return LORAPLUS_LR_EMBEDDING if given is None else given
        return self.lr * self.loraplus_lr_ratio if "lora_B" in parts or ndim == 1 else self.lr

    def set_rates(self, optimizer: torch.optim.Optimizer, progress: float) -> float:
        """Gives every group its rate at a point of the run; returns that of `lr`.

        All groups rise and fall together, each from and to its own highest rate.
        """
        lr = self.rate(progress)
        for group in optimizer.param_groups:
            group["lr"] = lr * (group["peak_lr"] / self.lr)  # exactly lr where the peak is lr
        return lr

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


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay is for a parameter: a matrix of no norm, no bias, no magnitude.

    Dimensions alone do not tell: DoRA's magnitude of a convolution has four, Cohere's norms of
    queries and biases of experts have two.

    Example:
        >>> decays("mlp.up_proj.weight", 2), decays("self_attn.q_norm.weight", 2)
        (True, False)
    """
    parts = name.split(".")
    copied = parts.index("modules_to_save") if "modules_to_save" in parts else len(parts) - 1
    owner = parts[copied - 1] if copied > 0 else ""
    is_bias = parts[-1] == "bias" or parts[-1].endswith("_bias")
    is_magnitude = "lora_magnitude_vector" in parts
    return ndim >= 2 and not is_bias and not is_magnitude and not _NORM.search(owner)


def _kinds(names: Iterable[str]) -> list[str]:
    """The names with the numbers of layers and experts left out, each once."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names})
