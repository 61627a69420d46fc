"""What a student and its teacher say at each supervised position, and what that comes to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int64

# What a target is: right; the first wrong token of an answer, which has the right ones before it;
# what comes behind that one; or a target of which nobody says whether it is right.
RIGHT, WRONG, BEHIND, UNKNOWN = LABELS = ("right", "wrong", "behind", "unknown")


@dataclass(frozen=True, kw_only=True)
class Positions:
    """The supervised positions of some rows, in their order.

    Args:
        row: Of which of the rows each is.
        token: The target, as text.
        label: One of `LABELS`.
        teacher_target: The teacher's probability of the target.
        teacher_entropy: Of the teacher's distribution, in nats.
        teacher_top: The teacher's most likely token, as text.
        student_entropy: Of the student's distribution, in nats.
        ce: Cross-entropy of the student at the target, in nats.
        kd: Divergence between teacher and student, as the run's loss has it.
        agree: Whether both have the same most likely token.
    """

    row: Int64[np.ndarray, " tokens"]
    token: Sequence[str]
    label: Sequence[str]
    teacher_target: Float[np.ndarray, " tokens"]
    teacher_entropy: Float[np.ndarray, " tokens"]
    teacher_top: Sequence[str]
    student_entropy: Float[np.ndarray, " tokens"]
    ce: Float[np.ndarray, " tokens"]
    kd: Float[np.ndarray, " tokens"]
    agree: Bool[np.ndarray, " tokens"]

    @property
    def student_target(self) -> Float[np.ndarray, " tokens"]:
        """The student's probability of the target."""
        return np.exp(-self.ce)

    @property
    def missed(self) -> Float[np.ndarray, " tokens"]:
        """The teacher's probability on all tokens but the target: what the label does not tell."""
        return 1 - self.teacher_target

    def at(self, which: Bool[np.ndarray, " tokens"]) -> "Positions":
        """Those that are chosen."""
        chosen = np.flatnonzero(which)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Positions(
            **{
                name: value[chosen]
                if isinstance(value, np.ndarray)
                else tuple(value[i] for i in chosen)
                for name, value in values.items()
            }
        )

    def of_row(self, row: int) -> "Positions":
        """Those of one row."""
        return self.at(self.row == row)

    def labelled(self, *labels: str) -> "Positions":
        """Those whose target is one of these `LABELS`."""
        return self.at(np.isin(np.array(self.label), labels))


_COLUMNS: tuple[tuple[str, Callable[[Positions], Float[np.ndarray, " tokens"]], str], ...] = (
    ("teacher's p(target)", lambda x: x.teacher_target, ".3f"),
    ("mass missed by the label", lambda x: x.missed, ".3f"),
    ("teacher's entropy (nats)", lambda x: x.teacher_entropy, ".3f"),
)


def check_together(students: Mapping[str, Positions]) -> Positions:
    """The first of several students' positions, which are all of the same rows.

    Raises:
        ValueError: There is none, or they are positions of other rows.
    """
    if not students:
        raise ValueError("students: name at least one, with its positions")
    first, *others = students.values()
    for name, other in zip(list(students)[1:], others, strict=True):
        if not np.array_equal(first.row, other.row) or list(first.token) != list(other.token):
            raise ValueError(f"students[{name!r}]: positions of other rows than the first student's")
    return first


def render_positions(students: Mapping[str, Positions]) -> str:
    """Return, as a Markdown table, means over the positions of each label, and over all of them.

    Raises:
        ValueError: The students' positions are not of the same rows.
    """
    first = check_together(students)
    heads = ["target", "positions", *(name for name, _, _ in _COLUMNS)]
    for name in students:
        heads += [f"p(target), {name}", f"kd (nats), {name}", f"share of all kd, {name}"]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' --: |' * (len(heads) - 1)}"]
    wanted = [(label, (label,)) for label in LABELS if label in first.label] + [("all", LABELS)]
    for name, labels in wanted:
        chosen = first.labelled(*labels)
        cells = [name, f"{len(chosen.token):,}"]
        cells += [format(float(get(chosen).mean()), form) for _, get, form in _COLUMNS]
        for whole in students.values():
            own = whole.labelled(*labels)
            share = own.kd.sum() / whole.kd.sum() if whole.kd.sum() else 0.0
            cells += [f"{own.student_target.mean():.3f}", f"{own.kd.mean():.3f}", f"{share:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
