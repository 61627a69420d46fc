"""What to distil and how strongly (the spec), and what the loss of some tokens adds up to."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.divergences import forward_kl

Divergence = Callable[..., Float[Tensor, " tokens"]]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The loss of a run: `(1 - kd_ratio) * ce + kd_ratio * kd`, LLM-Neo's (arXiv:2411.06839).

    Args:
        divergence: A function of `neo.losses.divergences`, or a partial of one, called as
            `divergence(student_logits, teacher_logits, temperature=temperature)`.
        kd_ratio: Weight of the divergence, in [0, 1]; 0 needs no teacher.
        temperature: Softens both distributions in the divergence, never in the cross-entropy.
        chunk_tokens: Tokens whose logits are in memory at a time; changes no result.
    """

    divergence: Divergence = forward_kl
    kd_ratio: float | int = 0.5
    temperature: float | int = 1.0
    chunk_tokens: int = 256

    def __post_init__(self) -> None:
        problems = []
        if not callable(self.divergence):
            problems.append(
                f"loss.divergence={self.divergence!r}: must be a function of two logits, such as "
                "neo.losses.divergences.forward_kl with _partial_: true"
            )
        else:
            # A partial hides misspelt and impossible keywords until it is called.
            try:
                self.divergence(torch.zeros(1, 2), torch.zeros(1, 2), temperature=1.0)
            except (TypeError, ValueError) as error:
                problems.append(f"loss.divergence: {error}")
        if "temperature" in getattr(self.divergence, "keywords", {}):
            problems.append(
                "loss.divergence.temperature: set loss.temperature, which takes its place"
            )
        if not 0 <= self.kd_ratio <= 1:
            problems.append(f"loss.kd_ratio={self.kd_ratio}: must lie in [0, 1]")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            problems.append(f"loss.temperature={self.temperature}: must be a finite number above 0")
        if self.chunk_tokens < 1:
            problems.append(f"loss.chunk_tokens={self.chunk_tokens}: must be at least 1")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class TokenSums:
    """Sums over supervised tokens, in nats; whoever holds the last one divides, once.

    Only `loss` carries gradient. What needs a teacher is None where none was asked, never 0.

    Args:
        loss: `(1 - kd_ratio) * ce + kd_ratio * kd`.
        ce: Cross-entropy of the student at the targets.
        kd: Divergence between teacher and student, times the temperature squared.
        tokens: How many supervised tokens were summed over.
        agree: How many of them have the teacher's most likely id as the student's.
        teacher_mass_out: The teacher's probability on ids outside the shared vocabulary.
    """

    loss: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    kd: Float[Tensor, ""] | None
    tokens: Int64[Tensor, ""]
    agree: Int64[Tensor, ""] | None
    teacher_mass_out: Float[Tensor, ""] | None

    def __add__(self, other: "TokenSums") -> "TokenSums":
        """The sums over the tokens of both."""
        return TokenSums(
            loss=self.loss + other.loss,
            ce=self.ce + other.ce,
            kd=_add(self.kd, other.kd),
            tokens=self.tokens + other.tokens,
            agree=_add(self.agree, other.agree),
            teacher_mass_out=_add(self.teacher_mass_out, other.teacher_mass_out),
        )

    def detach(self) -> "TokenSums":
        """The same sums without gradient, to be kept for logging."""
        return replace(self, loss=self.loss.detach())


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum, or None where both are."""
    if a is None and b is None:
        return None
    if a is None or b is None:
        raise ValueError("sums with and without a teacher do not add up")
    return a + b
