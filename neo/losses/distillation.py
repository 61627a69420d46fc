"""What to distil and how strongly (the spec), and what the loss of some tokens adds up to."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.divergences import forward_kl

Divergence = Callable[..., Float[Tensor, " tokens"]]
KD_POSITIONS = ("aligned", "release")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The loss of a run: `(1 - kd_ratio) * ce + kd_ratio * kd`, LLM-Neo's (arXiv:2411.06839).

    Args:
        divergence: A function of `neo.losses.divergences` or of a file `divergences_NAME.py`
            beside it, or a partial of one, called as
            `divergence(student_logits, teacher_logits, temperature=temperature)`.
        kd_ratio: Weight of the divergence, in [0, 1]; 0 needs no teacher.
        temperature: Softens both distributions in the divergence, never in the cross-entropy.
        chunk_gib: Memory that logits and what is made of them may take at a time, in GiB; at least
            one token's. Changes no result. None: what suits the device (`fused.CHUNK_GIB`).
        kd_positions: `aligned` compares the models where the cross-entropy is taken. `release`
            trains on the positions of the code released with the paper, one later: the first
            token of an answer is never distilled, and the position after its last one is.
    """

    divergence: Divergence = forward_kl
    kd_ratio: float | int = 0.5
    temperature: float | int = 1.0
    chunk_gib: float | int | None = None
    kd_positions: str = "aligned"

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
                value = self.divergence(torch.zeros(2, 3), torch.zeros(2, 3), temperature=1.0)
            except (TypeError, ValueError) as error:
                problems.append(f"loss.divergence: {error}")
            else:
                # A mean over tokens would be summed as if it were one token's.
                if not isinstance(value, Tensor) or value.shape != (2,):
                    shape = tuple(value.shape) if isinstance(value, Tensor) else value
                    problems.append(
                        f"loss.divergence: gives {shape} for two tokens; must be one number a "
                        "token, of shape (2,)"
                    )
        if "temperature" in getattr(self.divergence, "keywords", {}):
            problems.append(
                "loss.divergence.temperature: set loss.temperature, which takes its place"
            )
        if not 0 <= self.kd_ratio <= 1:
            problems.append(f"loss.kd_ratio={self.kd_ratio}: must lie in [0, 1]")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            problems.append(f"loss.temperature={self.temperature}: must be a finite number above 0")
        if self.chunk_gib is not None and not 0 < self.chunk_gib < math.inf:
            problems.append(f"loss.chunk_gib={self.chunk_gib}: must be above 0, or null")
        if self.kd_positions not in KD_POSITIONS:
            problems.append(
                f"loss.kd_positions={self.kd_positions!r}: must be one of {', '.join(KD_POSITIONS)}"
            )
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
        student_entropy: Of the student's distribution at temperature 1.
        agree: How many of them have the teacher's most likely id as the student's.
        teacher_target: The teacher's probability of the targets, at temperature 1.
        teacher_mass_out: The teacher's probability on ids outside the shared vocabulary.
    """

    loss: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    kd: Float[Tensor, ""] | None
    tokens: Int64[Tensor, ""]
    student_entropy: Float[Tensor, ""]
    agree: Int64[Tensor, ""] | None
    teacher_target: Float[Tensor, ""] | None
    teacher_mass_out: Float[Tensor, ""] | None

    def __add__(self, other: "TokenSums") -> "TokenSums":
        """The sums over the tokens of both."""
        return TokenSums(
            loss=self.loss + other.loss,
            ce=self.ce + other.ce,
            kd=_add(self.kd, other.kd),
            tokens=self.tokens + other.tokens,
            student_entropy=self.student_entropy + other.student_entropy,
            agree=_add(self.agree, other.agree),
            teacher_target=_add(self.teacher_target, other.teacher_target),
            teacher_mass_out=_add(self.teacher_mass_out, other.teacher_mass_out),
        )

    def detach(self) -> "TokenSums":
        """The same sums without gradient, to be kept for logging."""
        return replace(self, loss=self.loss.detach())


def function_of(divergence: Divergence) -> Divergence:
    """The function, of a partial of one."""
    return divergence.func if isinstance(divergence, functools.partial) else divergence


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum, or None where both are."""
    if a is None and b is None:
        return None
    if a is None or b is None:
        raise ValueError("sums with and without a teacher do not add up")
    return a + b
