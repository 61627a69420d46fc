"""The rows of a table with the runs behind them, and which of them are clearly good."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from neo.results import against
from neo.results.against import Comparison
from neo.results.records import RunRecord
from neo.results.row_spec import RowSpec, Value
from neo.results.summary import ABSENT, TableRow, lookup
from neo.results.table_spec import ColumnSpec, TableSpec


@dataclass(frozen=True)
class Table:
    """A table's rows with their runs, and the runs that stand in none.

    Attributes:
        unmatched: Runs that match no row.
    """

    spec: TableSpec
    rows: list[TableRow]
    unmatched: list[RunRecord] = field(default_factory=list)

    @property
    def failed(self) -> list[tuple[str, RunRecord]]:
        """Row label and run, for every run that matches a row and did not finish."""
        return [(row.spec.name, run) for row in self.rows for run in row.failed]

    @property
    def runs(self) -> list[RunRecord]:
        """Every run that the table shows, failed ones too, each once."""
        shown = [run for row in self.rows for run in row.runs] + [run for _, run in self.failed]
        return list({run.run_id: run for run in shown}.values())

    @property
    def not_run(self) -> list[RowSpec]:
        """The rows that wait for a run: marked as pending, and none matches."""
        rows = (row for row in self.rows if row.spec.pending)
        return [row.spec for row in rows if not row.runs and not row.failed]

    @property
    def has_groups(self) -> bool:
        """Whether any row stands in a group, so that the table has a column for it."""
        return any(row.spec.group for row in self.rows)

    def comparisons(self, column: ColumnSpec) -> dict[int, Comparison | None]:
        """Return how each row that is compared in `column` differs from the baseline, by index."""
        if not column.compare:
            return {}
        return against.compare(self.rows, self.spec.baseline, column, self.spec.interval)

    def best(self, column: ColumnSpec) -> set[int]:
        """Return the indices of the rows that are clearly good in `column`.

        With a baseline: the rows that are better than it by the paired test, so none in a column
        that is not compared. Without: the row of each group that is better than every other one
        by the paired test. Reference rows do not compete.
        """
        if self.spec.baseline:
            found = self.comparisons(column).items()
            return {i for i, shown in found if shown is not None and shown.is_better(column)}
        winners = set()
        for group in {row.spec.group for row in self.rows}:
            rows = {
                i: row
                for i, row in enumerate(self.rows)
                if row.spec.group == group and not row.spec.reference
            }
            winners.add(against.leader(rows, column))
        return {i for i in winners if i is not None}


def build_table(spec: TableSpec, records: Iterable[RunRecord]) -> Table:
    """Return the table of `spec`, filled with the records that match its rows.

    Raises:
        ValueError: A `where` or a column names a key that no record has, or two finished runs of
            one row have the same seed, so that they would be counted as if they were repetitions.
    """
    ordered = sorted(records, key=lambda run: (run.seed, run.run_id))
    table = Table(spec, [TableRow(row, []) for row in spec.rows])
    for i, column in enumerate(spec.columns):
        unknown = column.source == "config" and all(
            lookup(run, column.key) is ABSENT for run in ordered
        )
        if ordered and unknown:
            raise ValueError(
                f"columns[{i}].config: no record has a choice or a config key {column.key!r}"
            )
    for i, row in enumerate(table.rows):
        for key in row.spec.where:
            if ordered and all(lookup(run, key) is ABSENT for run in ordered):
                raise ValueError(f"rows[{i}].where: no record has a choice or a config key {key!r}")
        seeds: dict[int, str] = {}
        for run in ordered:
            if not matches(run, row.spec.where):
                continue
            if run.status != "ok":
                row.failed.append(run)
                continue
            if run.seed in seeds:
                raise ValueError(
                    f"rows[{i}] ({row.spec.name}) matches two runs of seed {run.seed}: "
                    f"{seeds[run.seed]} and {run.run_id}; 'where' must tell them apart"
                )
            seeds[run.seed] = run.run_id
            row.runs.append(run)
    for run in ordered:
        if not any(matches(run, row.where) for row in spec.rows):
            table.unmatched.append(run)
    return table


def matches(run: RunRecord, where: dict[str, list[Value]]) -> bool:
    """Return whether the run has, at every key of `where`, one of the values named there.

    A key that the run does not have is null. A `where` that names nothing, as that of a quoted
    row, matches no run.
    """
    return bool(where) and all(
        any(_same(lookup(run, key), value) for value in values) for key, values in where.items()
    )


def _same(left: Any, right: Value) -> bool:
    if left is ABSENT:
        return right is None  # a key that a run leaves out is as good as null
    # True == 1 in Python, but not in a config.
    return left == right and isinstance(left, bool) == isinstance(right, bool)
