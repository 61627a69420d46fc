"""What a teacher gives for some tokens: all that a loss asks of it.

An online teacher gives hidden states, of which its head makes logits. A cached one may give less:
what the divergence of the run needs, and no more.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.head import Head


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """Logits in the making: every divergence at every temperature.

    Args:
        hidden: Hidden states after the last norm.
        head: What makes logits of them; never gets gradient.
    """

    hidden: Float[Tensor, "tokens d_teacher"]
    head: Head


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is reported of a teacher beside the loss, at temperature 1.

    Args:
        target: Its probability of the target.
        top: Its most likely id.
        mass_out: Its probability on ids outside the shared vocabulary; None where there are none.
    """

    target: Float[Tensor, " tokens"]
    top: Int64[Tensor, " tokens"]
    mass_out: Float[Tensor, " tokens"] | None = None


@dataclass(frozen=True, kw_only=True)
class Projected:
    r"""Forward KL at one temperature for a student whose head $W$ is frozen.

    With $p$ the teacher's probabilities at temperature $T$, $H$ their entropy, and student logits
    $s = a (W h + b)$, the divergence $\mathrm{KL}(p \| q)$ is
    $\mathrm{lse}(s / T) - a (c \cdot h + p \cdot b) / T - H$ with $c = W^\top p$: the $d$ numbers
    of c are enough.

    Args:
        mean_row: c, the mean row of the student's head under the teacher.
        mean_bias: p . b; None where the head has no bias.
        entropy: H, in nats.
        temperature: T.
        facts: For the report.
    """

    mean_row: Float[Tensor, "tokens d_student"]
    mean_bias: Float[Tensor, " tokens"] | None = None
    entropy: Float[Tensor, " tokens"]
    temperature: float
    facts: Facts


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Some ids with the teacher's probabilities at one temperature, and what the others have.

    No id stands twice in a row; unused places at the end of a row have a log-probability of minus
    infinity and any id.

    Args:
        ids: Of the tokens' lists.
        log_p: Log of their probabilities; of a sample, log of the weights that stand for them.
        log_rest: Log of the probability that all other ids have together, minus infinity where
            nothing is left. None: nothing is said of the others. The list is a sample then, whose
            weights are the teacher's probabilities in expectation, each id's for itself.
        entropy: Of the teacher at the temperature, in nats; of a sample alone.
        temperature: Of both.
        facts: For the report.
    """

    ids: Int64[Tensor, "tokens k"]
    log_p: Float[Tensor, "tokens k"]
    log_rest: Float[Tensor, " tokens"] | None
    entropy: Float[Tensor, " tokens"] | None
    temperature: float
    facts: Facts


Given = HiddenStates | Projected | Listed


SomeGiven = TypeVar("SomeGiven", bound=Given | Facts)


def of_tokens(given: SomeGiven, which: slice) -> SomeGiven:
    """What is given for some of the tokens."""
    chosen: dict[str, Any] = {}
    for field in fields(given):
        value = getattr(given, field.name)
        if isinstance(value, Tensor):
            chosen[field.name] = value[which]
        elif isinstance(value, Facts):
            chosen[field.name] = of_tokens(value, which)
    return replace(given, **chosen)
