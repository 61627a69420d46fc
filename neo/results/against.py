"""Rows of a table against its baseline, seed by seed: a paired test per row and compared column."""

from collections.abc import Sequence
from dataclasses import dataclass

from neo.results.paired import Paired, holm, paired_t
from neo.results.printing import MISSING, Cell, number, p_value
from neo.results.summary import TableRow, by_seed
from neo.results.table_spec import ColumnSpec

LEVEL = 0.05  # of the corrected p-value below which a difference is called one


@dataclass(frozen=True)
class Comparison:
    """One row against the baseline in one column, in recorded units.

    Attributes:
        paired: Over the seeds that both have.
        p_holm: `paired.p` corrected for all rows compared in the column; None where it is None.
    """

    paired: Paired
    p_holm: float | None

    def is_better(self, column: ColumnSpec) -> bool:
        """Whether the row lies at the good side of the baseline by the corrected test."""
        if self.p_holm is None or self.p_holm >= LEVEL or column.better is None:
            return False
        return (self.paired.difference > 0) == (column.better == "higher")


def compare(
    rows: Sequence[TableRow], baseline: str, column: ColumnSpec
) -> dict[int, Comparison | None]:
    """Return the comparison of every row that is compared, by its index in `rows`.

    A row is compared with the row of its group that is labelled `baseline`. None stands for a row
    that shares fewer than two seeds with it; reference rows and the baseline itself have no entry.
    """
    found: dict[int, Paired | None] = {}
    for i, row in enumerate(rows):
        if row.spec.reference or row.spec.label == baseline:
            continue
        (base,) = [
            other
            for other in rows
            if other.spec.label == baseline
            and other.spec.group == row.spec.group
            and not other.spec.reference
        ]
        own, its = by_seed(row.runs, column.key), by_seed(base.runs, column.key)
        shared = sorted(own.keys() & its.keys())
        found[i] = paired_t([own[seed] for seed in shared], [its[seed] for seed in shared])
    tested = [i for i, paired in found.items() if paired is not None and paired.p is not None]
    ps = [paired.p for i in tested if (paired := found[i]) is not None and paired.p is not None]
    corrected = dict(zip(tested, holm(ps), strict=True))
    return {
        i: None if paired is None else Comparison(paired, corrected.get(i))
        for i, paired in found.items()
    }


def headers(column: ColumnSpec) -> list[str]:
    """Return the headers of a compared column: the difference with its unit, and p."""
    unit = "points" if column.unit == "%" else column.unit  # a difference of two percentages
    arrow = {"higher": " ↑", "lower": " ↓", None: ""}[column.better]
    return [f"{column.label}{f' ({unit})' if unit else ''}{arrow}", "p"]


def cells(comparison: Comparison | None, column: ColumnSpec, num_runs: int) -> list[Cell]:
    """Return the difference with its interval, and the corrected p-value.

    Args:
        comparison: Of the row in `column`.
        column: Gives scale and decimals.
        num_runs: Shared seeds that the row's line states; a column that has fewer says so.
    """
    if comparison is None:
        return [Cell(MISSING), Cell(MISSING)]
    paired = comparison.paired
    mean, low, high = (
        number(value * column.scale, column.decimals, sign=True)
        for value in (paired.difference, paired.low, paired.high)
    )
    rest = f" [{low}, {high}]"
    if paired.n != num_runs:
        rest += f" (n={paired.n})"
    p = MISSING if comparison.p_holm is None else p_value(comparison.p_holm)
    return [Cell(mean, bold=comparison.is_better(column), rest=rest), Cell(p)]


def note(baseline: str, num_pairs: int) -> str:
    """Return what the numbers of the comparison mean, and what they rest on.

    Args:
        baseline: Label of the row that the others are compared with.
        num_pairs: The largest number of shared seeds.
    """
    text = (
        f"Mean over the shared seeds of the row's number minus that of {baseline}, with its 95 % "
        "confidence interval (of one row by itself) by the paired t distribution; p: of the "
        "two-sided paired t test, after Holm's correction for all rows that are tested in the "
        f"column. Bold: better than {baseline} with p < {LEVEL}. {MISSING}: fewer than two shared "
        "seeds, or differences that are all equal and leave nothing to test. A run that did not "
        "finish is in no pair."
    )
    if num_pairs > 1:
        text += (
            f" With {num_pairs} pairs an exact sign-flip test has no p below 2/{2**num_pairs} = "
            f"{2 / 2**num_pairs:.3g}, even before the correction. The t test can go lower because "
            "it assumes more: that the differences of the seeds are independent draws from one "
            "normal distribution, which so few of them cannot show."
        )
    return text
