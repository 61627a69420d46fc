"""A block of the student's logits against what a teacher gave for the same tokens.

Each kind of teacher's numbers is compared in its own way; all give the divergence per token and its
gradient in the student's logits.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.distillation import Distillation
from neo.losses.given import Facts, of_tokens
from neo.losses.gradients import (
    PerToken,
    Rows,
    Softened,
    divergence_of,
    log_partition,
)


@dataclass(frozen=True)
class StudentBlock:
    """A student at temperature 1.

    Args:
        logits: Of a few tokens.
        q: Their softmax.
        top: The largest of each token.
        log_z: Log of the sum of their exponentials.
    """

    logits: Rows
    q: Rows
    top: PerToken
    log_z: PerToken

    def softened(self, temperature: float) -> tuple[Rows, PerToken]:
        """Probabilities and log of the softmax's denominator at a temperature."""
        if temperature == 1:
            return self.q, self.log_z
        logits = self.logits / temperature
        q = logits.softmax(-1)
        return q, log_partition(logits.amax(-1), q)


@dataclass(frozen=True)
class Compared:
    """What came of a block.

    Args:
        kd: The divergence per token, in nats.
        gradient: Of the divergence in the student's logits; of a projected teacher without the part
            that it has in common with the mean row, which is taken off the gradient of the hidden
            states. None where none was asked for.
        agree: How many tokens have the same most likely id in both models.
        target: The teacher's probability of the targets, summed.
        mass_out: Its probability on ids that are not shared, summed.
    """

    kd: PerToken
    gradient: Rows | None
    agree: Int64[Tensor, ""]
    target: Float[Tensor, ""]
    mass_out: Float[Tensor, ""] | float


class Comparison(ABC):
    """A teacher's numbers for the tokens of a chunk."""

    @abstractmethod
    def at(self, block: slice) -> "Comparison":
        """Those of some of the tokens."""

    @abstractmethod
    def against(
        self,
        student: StudentBlock,
        targets: Int64[Tensor, "block 1"],
        spec: Distillation,
        *,
        gradient: bool,
    ) -> Compared:
        """The comparison with a student of as many tokens."""


@dataclass(frozen=True)
class ByLogits(Comparison):
    """A teacher that gives all logits.

    Args:
        logits: Over the shared ids.
        outside: Log of the summed exponentials of its logits on ids that are not shared; None where
            there are none.
    """

    logits: Rows
    outside: PerToken | None = None

    def at(self, block: slice) -> "ByLogits":
        """Those of some of the tokens."""
        return ByLogits(self.logits[block], None if self.outside is None else self.outside[block])

    def against(
        self,
        student: StudentBlock,
        targets: Int64[Tensor, "block 1"],
        spec: Distillation,
        *,
        gradient: bool,
    ) -> Compared:
        """By any divergence."""
        s, t = student.logits, self.logits
        p, top = t.softmax(-1), t.amax(-1)
        log_z = log_partition(top, p)
        target = p.gather(-1, targets).sum()
        mass_out = 0.0 if self.outside is None else torch.sigmoid(self.outside - log_z).sum()
        # Where no id is both models' top, no sum of their logits is the sum of the tops. An argmax
        # would tell the same and costs a CPU several times as long.
        agree = ((s + t).amax(-1) == student.top + top).sum()
        both = Softened(s, t, student.q, p, student.log_z, log_z)
        temperature = float(spec.temperature)
        kd, slope = divergence_of(both, spec.divergence, temperature, gradient=gradient)
        return Compared(kd, slope, agree, target, mass_out)


@dataclass(frozen=True)
class ByMeanLogit(Comparison):
    """A teacher that gives forward KL alone, by the student's mean logit under it.

    Args:
        mean_logit: Of the student, under the teacher's distribution at the temperature.
        entropy: Of that distribution.
        facts: For the report.
    """

    mean_logit: PerToken
    entropy: PerToken
    facts: Facts

    def at(self, block: slice) -> "ByMeanLogit":
        """Those of some of the tokens."""
        return ByMeanLogit(
            self.mean_logit[block], self.entropy[block], of_tokens(self.facts, block)
        )

    def against(
        self,
        student: StudentBlock,
        targets: Int64[Tensor, "block 1"],
        spec: Distillation,
        *,
        gradient: bool,
    ) -> Compared:
        """By forward KL; the gradient is T q, of which the caller takes T c off."""
        temperature = float(spec.temperature)
        q, log_z = student.softened(temperature)
        kd = temperature**2 * (log_z - self.mean_logit / temperature - self.entropy)
        slope = None
        if gradient:
            slope = q if temperature == 1 else q.mul_(temperature)
        return reported(kd, slope, student, self.facts)


def reported(kd: PerToken, slope: Rows | None, student: StudentBlock, facts: Facts) -> Compared:
    """A comparison by a teacher of which no logits are there."""
    of_top = student.logits.gather(-1, facts.top.unsqueeze(-1)).squeeze(-1)
    return Compared(
        kd,
        slope,
        (of_top == student.top).sum(),
        facts.target.sum(),
        0.0 if facts.mass_out is None else facts.mass_out.sum(),
    )
