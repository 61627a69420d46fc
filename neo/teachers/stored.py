"""What a cache keeps of a teacher, token by token, and which losses can be computed from it."""

import functools
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from neo.losses.distillation import Distillation
from neo.losses.divergences import adaptive_kl, forward_kl, reverse_kl, skew_reverse_kl

KINDS = ("projected", "hidden", "top_k", "top_p", "sampled")
# The first is the default. Hidden states stay in the dtype that the teacher gives them in.
VALUES: dict[str, tuple[str, ...]] = {
    "projected": ("float32", "bfloat16", "int8"),
    "hidden": ("float32", "bfloat16", "float16"),
    "top_k": ("fixed16", "float32"),
    "top_p": ("fixed16", "float32"),
    "sampled": ("fixed16", "float32"),
}
MISSING = ("other", "renormalise")
# Within these no weight leaves the range of fixed16 so far that it would show.
PROPOSALS = (0.4, 1.25)
# Longer lists would not have their lengths in 16 bits.
MAX_LIST = 2**16 - 1
# What a kind may be asked for besides temperature and seed, with what it is where it is left out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "projected": {"values": "float32"},
    "hidden": {"values": None},
    "top_k": {"values": "fixed16", "k": 64, "missing": "other"},
    "top_p": {"values": "fixed16", "p": 0.95, "k": None, "missing": "other"},
    "sampled": {"values": "fixed16", "k": None, "samples": 64, "proposal": 1.0},
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One way to keep a teacher's distribution; what is left out has its kind's default.

    Args:
        kind: `projected`: the mean row of the student's head under the teacher, and the entropy;
            forward KL of a frozen head is exact with it. `hidden`: the teacher's hidden states;
            exact for all. `top_k` and `top_p`: the most likely ids. `sampled`: ids drawn from the
            teacher with weights, whose mean is its distribution (Anshumann et al. 2025,
            arXiv:2503.16870).
        temperature: Of the distribution that is kept; hidden states serve every temperature.
        values: How numbers are kept. Of `projected` float32, bfloat16 or int8 (rounded at random,
            right on average); of `hidden` float32, bfloat16 or float16, None is what the teacher
            gives; of lists float32 or fixed16 (steps of 2^-11 nats).
        k: Of `top_k` how many ids are kept, 64; of `top_p` how many at most; of `sampled` how many
            of the most likely ids are kept exactly, before the rest is sampled.
        p: Of `top_p`: the fewest ids are kept whose probabilities add up to it, 0.95.
        samples: Of `sampled`: draws per token, 64.
        proposal: Of `sampled`: ids are drawn in proportion to their probability to this power.
        missing: Of `top_k` and `top_p`: all other ids are one more id (`other`), or what is kept is
            made to add up to 1 (`renormalise`), as most others do, which biases the student.
        seed: Of what is drawn or rounded at random.
    """

    kind: str
    temperature: float | int = 1.0
    values: str | None = None
    k: int | None = None
    p: float | int | None = None
    samples: int | None = None
    proposal: float | int | None = None
    missing: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("\n".join(problems))

    def _problems(self) -> list[str]:
        if self.kind not in KINDS:
            return [f"kind={self.kind!r}: must be one of {', '.join(KINDS)}"]
        problems = []
        own = DEFAULTS[self.kind]
        for key in ("values", "k", "p", "samples", "proposal", "missing"):
            value = getattr(self, key)
            if value is not None and key not in own:
                kinds = " or ".join(kind for kind in KINDS if key in DEFAULTS[kind])
                problems.append(
                    f"{key}={value!r}: is of kind={kinds}, and this is {self.kind!r}; leave it out"
                )
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            problems.append(f"temperature={self.temperature!r}: must be a finite number above 0")
        elif self.kind == "hidden" and self.temperature != 1:
            problems.append(
                f"temperature={self.temperature}: must be 1 for kind='hidden', which serves every "
                "temperature; leave it out"
            )
        if self.values is not None and self.values not in VALUES[self.kind]:
            problems.append(
                f"values={self.values!r}: must be one of {', '.join(VALUES[self.kind])} for "
                f"kind={self.kind!r}"
            )
        for key in ("k", "samples"):
            value = getattr(self, key)
            if value is not None and key in own and not (_is_int(value) and value >= 1):
                problems.append(f"{key}={value!r}: must be a whole number of at least 1")
        if (
            not problems
            and self.kind == "sampled"
            and (length := (self.k or 0) + (self.samples or own["samples"])) > MAX_LIST
        ):
            problems.append(f"k + samples={length}: must be at most {MAX_LIST}")
        if self.p is not None and "p" in own and not (_is_number(self.p) and 0 < self.p <= 1):
            problems.append(f"p={self.p!r}: must lie in (0, 1]")
        least, most = PROPOSALS
        if (
            self.proposal is not None
            and "proposal" in own
            and not (_is_number(self.proposal) and least <= self.proposal <= most)
        ):
            problems.append(
                f"proposal={self.proposal!r}: must lie between {least} and {most}; 1 draws from "
                "the teacher itself"
            )
        if self.missing is not None and "missing" in own and self.missing not in MISSING:
            problems.append(f"missing={self.missing!r}: must be one of {', '.join(MISSING)}")
        if not (_is_int(self.seed) and 0 <= self.seed < 2**63):
            problems.append(f"seed={self.seed!r}: must be a whole number from 0 to 2^63 - 1")
        return problems

    @property
    def is_random(self) -> bool:
        """Whether anything of it is drawn or rounded at random."""
        return self.kind == "sampled" or self.values == "int8"

    @property
    def is_lossy(self) -> bool:
        """Whether anything of what the loss needs is rounded away or left out."""
        if self.kind == "hidden":
            return False  # kept as the teacher gives them, or as their owner asked
        return self.kind != "projected" or self.values not in (None, "float32")

    def resolved(self, hidden_dtype: str | None = None) -> "Stored":
        """The same with every default filled in, and no seed where nothing is random.

        Args:
            hidden_dtype: Of the teacher's hidden states, such as "bfloat16"; what kind=hidden
                without `values` keeps. None leaves that open.
        """
        filled = {
            key: default
            for key, default in DEFAULTS[self.kind].items()
            if getattr(self, key) is None
        }
        if self.kind == "hidden" and self.values is None and hidden_dtype is not None:
            # nobody computes hidden states in float64 but a test
            filled["values"] = hidden_dtype if hidden_dtype in VALUES["hidden"] else "float32"
        numbers = {
            key: float(value)
            for key in ("temperature", "p", "proposal")
            if (value := filled.get(key, getattr(self, key))) is not None
        }
        whole = replace(self, **{**filled, **numbers})
        return whole if whole.is_random else replace(whole, seed=0)

    def as_dict(self) -> dict[str, Any]:
        """The keys that are of its kind, as plain data."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def given_refusals(
        self,
        spec: Distillation,
        *,
        head_changes: bool = False,
        softcap: float | None = None,
    ) -> list[str]:
        """Why the loss of a run cannot be computed from what is kept; empty where it can.

        Args:
            spec: The run's loss.
            head_changes: The student's head is trained or has a branch.
            softcap: Of the student's head.
        """
        stored = self.resolved()
        divergence, keywords = _unwrapped(spec.divergence)
        name = getattr(divergence, "__name__", str(divergence))
        refusals = []
        if spec.kd_positions == "release":
            refusals.append(
                "loss.kd_positions=release: takes tokens that are not supervised, and a cache "
                "keeps supervised ones only; use aligned, or an online teacher"
            )
        if stored.kind != "hidden" and spec.temperature != stored.temperature:
            refusals.append(
                f"loss.temperature={spec.temperature}: kind={stored.kind} was written at "
                f"temperature={stored.temperature}, and serves that alone; use it, write another "
                "cache, or keep kind=hidden, which serves all"
            )
        if stored.kind == "projected":
            only = "kind=projected keeps what forward_kl of a frozen linear head needs"
            instead = "use kind=hidden, or an online teacher"
            if divergence is not forward_kl:
                refusals.append(f"loss.divergence={name}: {only}; {instead}")
            if head_changes:
                refusals.append(f"the student's head is trained or adapted: {only}; {instead}")
            if softcap is not None:
                refusals.append(
                    f"the student's head bounds its logits (softcap={softcap}): {only}; {instead}"
                )
        if stored.kind == "sampled" and divergence is not forward_kl:
            refusals.append(
                f"loss.divergence={name}: a sample is unbiased for what is linear in the "
                "teacher's probabilities, which forward_kl alone is; use kind=top_k or kind=hidden"
            )
        infinite = divergence in (reverse_kl, adaptive_kl) or (
            divergence is skew_reverse_kl and keywords.get("skew") == 0
        )
        if stored.missing == "renormalise" and infinite:
            refusals.append(
                f"loss.divergence={name}: is infinite where the teacher gives ids no probability, "
                "and missing=renormalise gives none to all that was left out; use missing=other"
            )
        return refusals


def _unwrapped(divergence: Any) -> tuple[Any, dict[str, Any]]:
    """The function of a partial, or of one of one, with the keywords it is given."""
    keywords: dict[str, Any] = {}
    while isinstance(divergence, functools.partial):
        keywords = {**divergence.keywords, **keywords}
        divergence = divergence.func
    return divergence, keywords


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
