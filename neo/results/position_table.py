"""What a student and its teacher say at each supervised position, and what that comes to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from neo.results.markdown import line
from neo.results.printing import number

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
        places = np.flatnonzero(which)

        def chosen(value: Any) -> Any:
            is_array = isinstance(value, np.ndarray)
            return value[places] if is_array else tuple(value[place] for place in places)

        return Positions(
            **{field.name: chosen(getattr(self, field.name)) for field in fields(self)}
        )

    def of_row(self, row: int) -> "Positions":
        """Those of one row."""
        return self.at(self.row == row)

    def labelled(self, *labels: str) -> "Positions":
        """Those whose target is one of these `LABELS`."""
        return self.at(np.isin(np.array(self.label), labels))


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
            raise ValueError(
                f"students[{name!r}]: positions of other rows than the first student's"
            )
    return first


def render_positions(students: Mapping[str, Positions]) -> str:
    """Return, as a Markdown table, means over the positions of each label, and over all of them.

    Args:
        students: By name, the positions of one student each; all of the same rows.

    Raises:
        ValueError: There is none, or they are positions of other rows.
    """
    first = check_together(students)
    heads = ["target", "positions", "p(target), teacher", "missed by the label"]
    heads += ["entropy, teacher (nats)", *(f"p(target), {name}" for name in students)]
    heads += [f"kd, {name} (nats)" for name in students]
    grid = [line(heads), line(["---"] + ["--:"] * (len(heads) - 1))]
    groups = {label: (label,) for label in LABELS if label in first.label} | {"all": LABELS}
    for name, labels in groups.items():
        teachers = first.labelled(*labels)
        own = [positions.labelled(*labels) for positions in students.values()]
        means = [teachers.teacher_target, teachers.missed, teachers.teacher_entropy]
        means += [positions.student_target for positions in own]
        means += [positions.kd for positions in own]
        numbers = [number(float(values.mean()), 3) for values in means]
        grid.append(line([name, f"{len(teachers.row):,}", *numbers]))
    return "\n".join(grid) + "\n"
