"""What a run asks to be kept of its teacher: the keys of `teacher` that are about a cache."""

from dataclasses import dataclass

from neo.losses.distillation import Distillation
from neo.teachers.stored import KINDS, Stored


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Whether and how a teacher's targets are kept, so that it runs once over each row.

    Args:
        cache: A folder of caches, each under its name. A run finds its own there, and stores what
            it lacks. None: nothing is kept.
        kind: As in `Stored`; None is `projected` where the loss is forward KL and the student's
            head a frozen linear layer, else `hidden`: both are exact.
        values: As in `Stored`, as are the keys below.
        k: Of `top_k`, `top_p` and `sampled`.
        p: Of `top_p`.
        samples: Of `sampled`.
        proposal: Of `sampled`.
        missing: Of `top_k` and `top_p`.
    """

    cache: str | None = None
    kind: str | None = None
    values: str | None = None
    k: int | None = None
    p: float | None = None
    samples: int | None = None
    proposal: float | None = None
    missing: str | None = None

    def check_keeping(self) -> None:
        """Raise where the keys do not go together, as far as that needs no loss and no model."""
        if self.kind is not None:
            self._stored(self.kind, 1.0)
            return
        keys = ("values", "k", "p", "samples", "proposal", "missing")
        for key in keys:
            if (value := getattr(self, key)) is not None:
                raise ValueError(
                    f"{key}={value!r}: needs kind, one of {', '.join(KINDS)}, which says what it "
                    "is of"
                )

    def stored(
        self, spec: Distillation, *, head_changes: bool = False, softcap: float | None = None
    ) -> Stored:
        """What is kept for a run, with the defaults of its kind.

        Args:
            spec: Its loss.
            head_changes: The student's head is trained or has a branch.
            softcap: Of the student's head.
        """
        if self.kind is not None:
            return self._stored(self.kind, spec.temperature)
        projected = self._stored("projected", spec.temperature)
        refused = projected.given_refusals(spec, head_changes=head_changes, softcap=softcap)
        return self._stored("hidden", 1.0) if refused else projected

    def _stored(self, kind: str, temperature: float) -> Stored:
        return Stored(
            kind=kind,
            temperature=1.0 if kind == "hidden" else temperature,
            values=self.values,
            k=self.k,
            p=self.p,
            samples=self.samples,
            proposal=self.proposal,
            missing=self.missing,
        ).resolved()
