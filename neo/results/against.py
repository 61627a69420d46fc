"""Rows of a table against its baseline, seed by seed: a paired test per row and compared column."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neo.results.bootstrap import COVERAGE, RESAMPLES
from neo.results.paired import Paired, holm, paired_t
from neo.results.printing import MISSING, Cell, number, p_value
from neo.results.summary import TableRow, by_seed, summarize
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
    rows: Sequence[TableRow], baseline: str, column: ColumnSpec, interval: str = "t"
) -> dict[int, Comparison | None]:
    """Return the comparison of every row that is compared, by its index in `rows`.

    A row is compared with the row of its group that is labelled `baseline`. None stands for a row
    that shares fewer than two seeds with it; reference rows and the baseline itself have no entry.
    """
    pairs: dict[int, tuple[TableRow, TableRow]] = {}
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
        pairs[i] = row, base
    return _tested(pairs, column, interval)


def leader(rows: Mapping[int, TableRow], column: ColumnSpec) -> int | None:
    """Return the key of the row that leads all others in `column` by more than chance, or None.

    It has the best mean, prints another number than any other row, and is better than every
    other row that has a number by the paired test, corrected for all of these tests. A row that
    shares fewer than two seeds with it cannot be tested, so that nothing leads it.
    """
    if column.better is None:
        return None
    means = {
        i: mean
        for i, row in rows.items()
        if (mean := summarize(row.runs, column.key).mean) is not None
    }
    if len(means) < 2:
        return None
    pick = max if column.better == "higher" else min
    best = pick(means, key=lambda i: means[i])
    printed = {i: number(mean * column.scale, column.decimals) for i, mean in means.items()}
    others = [i for i in means if i != best]
    found = _tested({i: (rows[best], rows[i]) for i in others}, column)
    ahead = all(
        shown is not None and shown.is_better(column) and printed[i] != printed[best]
        for i, shown in found.items()
    )
    return best if ahead else None


def _tested(
    pairs: Mapping[int, tuple[TableRow, TableRow]], column: ColumnSpec, interval: str = "t"
) -> dict[int, Comparison | None]:
    """Return how the first row of every pair differs from the second, tested all at once."""
    found: dict[int, Paired | None] = {}
    for i, (row, base) in pairs.items():
        own, its = by_seed(row.runs, column.key), by_seed(base.runs, column.key)
        shared = sorted(own.keys() & its.keys())
        numbers, baseline = [own[seed] for seed in shared], [its[seed] for seed in shared]
        found[i] = paired_t(numbers, baseline, interval)
    ps = {i: shown.p for i, shown in found.items() if shown is not None and shown.p is not None}
    corrected = dict(zip(ps, holm(list(ps.values())), strict=True))
    return {
        i: None if shown is None else Comparison(shown, corrected.get(i))
        for i, shown in found.items()
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


def note(baseline: str, num_pairs: int, interval: str = "t") -> str:
    """Return what the numbers of the comparison mean, and what they rest on.

    Args:
        baseline: Label of the row that the others are compared with.
        num_pairs: The largest number of shared seeds.
        interval: Of the differences, one of the table's `INTERVALS`.
    """
    kind = "the paired t distribution"
    if interval == "bootstrap":
        kind = f"a paired bootstrap over them (BCa, {RESAMPLES:,} resamples)"
    text = (
        f"Mean over the shared seeds of the row's number minus that of {baseline}, with its 95 % "
        f"confidence interval (of one row by itself) by {kind}; p: of the "
        "two-sided paired t test, after Holm's correction for all rows that are tested in the "
        f"column. Bold: better than {baseline} with p < {LEVEL}. {MISSING}: fewer than two shared "
        "seeds, or differences that are all equal and leave nothing to test. A run that did not "
        "finish is in no pair."
    )
    if interval == "bootstrap" and num_pairs > 1:
        text += (
            f" A bootstrap of few pairs is too narrow, since it takes them for all there are: with "
            f"{num_pairs} it holds the true mean in about {COVERAGE[num_pairs]} of 100 cases and "
            "not in 95, where differences are normal."
            if num_pairs in COVERAGE
            else f" The bootstrap of {num_pairs} pairs is a little too narrow, since it takes them "
            "for all there are."
        )
    if num_pairs > 1:
        text += (
            f" With {num_pairs} pairs an exact sign-flip test has no p below 2/{2**num_pairs} = "
            f"{2 / 2**num_pairs:.3g}, even before the correction. The t test can go lower because "
            "it assumes more: that the differences of the seeds are independent draws from one "
            "normal distribution, which so few of them cannot show."
        )
    return text


def leader_note(*, has_groups: bool, turned: bool = False) -> str:
    """Return what the bold numbers of a table without a baseline are.

    Args:
        has_groups: Whether rows compete within groups only.
        turned: Whether the rows stand as columns.
    """
    kind, among = ("column", "line") if turned else ("row", "group" if has_groups else "column")
    return (
        f"Bold: better than every other {kind} of its {among} that has "
        "a number there, each by the two-sided paired t test over the seeds that both have, with "
        f"p < {LEVEL} after Holm's correction for all of them. The test takes the differences of "
        "the seeds for draws from a normal distribution, which few seeds cannot show; where "
        "differences are all equal, it has nothing to hold them against."
    )
