"""Tables rendered from records: mean and standard deviation over seeds, never typed by hand."""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from neo.results.metrics import quantity
from neo.results.records import RunRecord
from neo.results.table_spec import ColumnSpec, RowSpec, Scalar, TableSpec

MISSING = "—"
_ABSENT = object()


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of `n` runs; None where there are too few of them."""

    mean: float | None
    std: float | None
    n: int


@dataclass(frozen=True)
class TableRow:
    """One row and the finished runs behind it, a seed each."""

    spec: RowSpec
    runs: list[RunRecord]


@dataclass(frozen=True)
class Table:
    """A table's rows with their runs, and the runs that stand in none.

    Attributes:
        failed: Row label and run, for every run that matches a row and did not finish.
        unmatched: Runs that match no row.
    """

    spec: TableSpec
    rows: list[TableRow]
    failed: list[tuple[str, RunRecord]] = field(default_factory=list)
    unmatched: list[RunRecord] = field(default_factory=list)

    @property
    def runs(self) -> list[RunRecord]:
        """Every run that the table shows, failed ones too, each once."""
        shown = [run for row in self.rows for run in row.runs] + [run for _, run in self.failed]
        return list({run.run_id: run for run in shown}.values())

    def best(self, column: ColumnSpec) -> set[int]:
        """Return the indices of the rows that are clearly best in `column`, one per group.

        Clearly: at least two runs each, and a gap to the second that is larger than both standard
        deviations and shows in the printed digits. Reference rows do not compete.
        """
        winners = set()
        for group in {row.spec.group for row in self.rows}:
            ranked = sorted(
                (
                    (summary.mean, summary.std, i)
                    for i, row in enumerate(self.rows)
                    if row.spec.group == group and not row.spec.reference
                    for summary in [summarize(row.runs, column.key)]
                    if summary.mean is not None
                ),
                key=lambda item: item[0],
                reverse=column.better == "higher",
            )
            if column.better is None or len(ranked) < 2:
                continue
            (best, best_std, i), (second, second_std, _) = ranked[:2]
            if best_std is None or second_std is None:
                continue
            differ = _number(best * column.scale, column) != _number(second * column.scale, column)
            if differ and abs(best - second) > max(best_std, second_std):
                winners.add(i)
        return winners


def build_table(spec: TableSpec, records: Iterable[RunRecord]) -> Table:
    """Return the table of `spec`, filled with the records that match its rows.

    Raises:
        ValueError: A `where` names a key that no record has, or two finished runs of one row have
            the same seed, so that they would be counted as if they were repetitions.
    """
    ordered = sorted(records, key=lambda run: (run.seed, run.run_id))
    table = Table(spec, [TableRow(row, []) for row in spec.rows])
    for i, row in enumerate(table.rows):
        for key in row.spec.where:
            if ordered and all(_lookup(run, key) is _ABSENT for run in ordered):
                raise ValueError(f"rows[{i}].where: no record has a choice or a config key {key!r}")
        seeds: dict[int, str] = {}
        for run in ordered:
            if not _matches(run, row.spec.where):
                continue
            if run.status != "ok":
                table.failed.append((_name(row.spec), run))
                continue
            if run.seed in seeds:
                raise ValueError(
                    f"rows[{i}] ({_name(row.spec)}) matches two runs of seed {run.seed}: "
                    f"{seeds[run.seed]} and {run.run_id}; 'where' must tell them apart"
                )
            seeds[run.seed] = run.run_id
            row.runs.append(run)
    for run in ordered:
        if not any(_matches(run, row.where) for row in spec.rows):
            table.unmatched.append(run)
    return table


def summarize(runs: Sequence[RunRecord], key: str) -> Summary:
    """Return mean and standard deviation, in recorded units, of the number `key` over the runs."""
    _, is_field = quantity(key)
    found = [getattr(run, key) if is_field else run.metrics.get(key) for run in runs]
    numbers = [float(number) for number in found if number is not None]
    return Summary(
        mean=statistics.fmean(numbers) if numbers else None,
        std=statistics.stdev(numbers) if len(numbers) > 1 else None,
        n=len(numbers),
    )


def cells(table: Table) -> list[list[str]]:
    """Return the printed cells, row by row, with `**` around the clearly best."""
    best = [table.best(column) for column in table.spec.columns]
    return [
        [
            _cell(row, column, bold=i in best[c]) if row.runs or row.spec.paper else MISSING
            for c, column in enumerate(table.spec.columns)
        ]
        for i, row in enumerate(table.rows)
    ]


def headers(table: Table) -> list[str]:
    """Return the printed headers: group where there is one, row, n, and the columns."""
    group = [table.spec.group_label] if _has_groups(table) else []
    return [*group, "", "n", *(column.header for column in table.spec.columns)]


def lines(table: Table) -> list[list[str]]:
    """Return the printed rows under `headers`, references in italics."""
    return [
        [
            *([row.spec.group] if _has_groups(table) else []),
            f"*{row.spec.label}*" if row.spec.reference else row.spec.label,
            str(len(row.runs)),
            *row_cells,
        ]
        for row, row_cells in zip(table.rows, cells(table), strict=True)
    ]


def render_markdown(table: Table) -> str:
    """Return the table as Markdown, with what it was made from under it."""
    spec = table.spec
    head = headers(table)
    left = 2 if _has_groups(table) else 1
    parts = [f"# {spec.title}", ""]
    parts += [_line(head), _line(["---"] * left + ["--:"] * (len(head) - left))]
    parts += [_line(row) for row in lines(table)]
    parts += ["", *_notes(table)]
    if table.failed:
        parts += ["", "Runs that did not finish:", ""]
        parts += [
            f"- {_plain(label)}, seed {run.seed}, run {run.run_id}: {run.status}"
            + (f" ({_plain(run.error)})" if run.error else "")
            for label, run in table.failed
        ]
    parts += ["", *_origin(table)]
    return "\n".join(parts) + "\n"


def render_csv(table: Table) -> str:
    """Return the table as CSV: recorded units, all digits, mean, std and n per column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [column.key for column in table.spec.columns]
    writer.writerow(["group", "row", *(f"{k}{end}" for k in keys for end in ("", "_std", "_n"))])
    for row in table.rows:
        numbers: list[float | int | str] = []
        for key in keys:
            summary = summarize(row.runs, key)
            numbers += [
                "" if summary.mean is None else summary.mean,
                "" if summary.std is None else summary.std,
                summary.n,
            ]
        writer.writerow([row.spec.group, row.spec.label, *numbers])
    return text.getvalue()


def _cell(row: TableRow, column: ColumnSpec, *, bold: bool) -> str:
    summary = summarize(row.runs, column.key)
    text = MISSING
    if summary.mean is not None:
        text = _number(summary.mean * column.scale, column)
        if summary.std:  # none for a single run, 0 for counts that the config fixes
            text += f" ± {_number(summary.std * column.scale, column)}"
        if bold:
            text = f"**{text}**"
        if summary.n != len(row.runs):
            text += f" (n={summary.n})"
    if column.key in row.spec.paper:
        paper = row.spec.paper[column.key]
        text += f" (paper {_number(paper, column)}"
        if summary.mean is not None:
            text += f", {summary.mean * column.scale - paper:+,.{column.decimals}f}"
        text += ")"
    return text


def _number(value: float | int, column: ColumnSpec) -> str:
    # Adding 0.0 turns the -0.0 that rounding leaves into 0.0.
    return f"{round(float(value), column.decimals) + 0.0:,.{column.decimals}f}"


def _notes(table: Table) -> list[str]:
    spec = table.spec
    rule = (
        f"Mean ± sample standard deviation over n seeds, without ± where all are equal; {MISSING} "
        "was not measured. Bold: the "
        "best mean of its column"
        + (" and group" if _has_groups(table) else "")
        + ", where best and second have at least two seeds and lie further apart than both "
        "standard deviations."
    )
    if any(row.reference for row in spec.rows):
        rule += " Rows in italics are for reference and do not compete."
    if any(row.paper for row in spec.rows):
        rule += " In brackets the paper's number and ours minus it."
    return ([spec.note, ""] if spec.note else []) + [rule]


def _origin(table: Table) -> list[str]:
    """Return command, code, dates, device and versions of the runs, as a list."""
    runs = table.runs
    facts = {"Command": f"`{table.spec.command}`" if table.spec.command else ""}
    if runs:
        codes = {
            (run.commit[:7] if run.commit else "no commit known")
            + (" with local changes" if run.dirty else "")
            for run in runs
        }
        first, last = min(run.started_at for run in runs), max(run.started_at for run in runs)
        versions = {f"{name} {version}" for run in runs for name, version in run.versions.items()}
        facts["Code"] = ", ".join(sorted(codes))
        facts["Runs"] = f"{len(runs)}, started {first} to {last}"
        facts["Device"] = "; ".join(sorted({run.device or "not recorded" for run in runs}))
        facts["Versions"] = ", ".join(sorted(versions))
    return [f"- {name}: {value}" for name, value in facts.items() if value]


def _matches(run: RunRecord, where: dict[str, list[Scalar]]) -> bool:
    return all(
        any(_same(_lookup(run, key), value) for value in values) for key, values in where.items()
    )


def _lookup(run: RunRecord, key: str) -> Any:
    """Return the choice or the value at a dotted config path, or `_ABSENT`."""
    if key in run.choices:
        return run.choices[key]
    value: Any = run.config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _same(left: Any, right: Scalar) -> bool:
    # True == 1 in Python, but not in a config.
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _name(row: RowSpec) -> str:
    return f"{row.group}, {row.label}" if row.group else row.label


def _has_groups(table: Table) -> bool:
    return any(row.spec.group for row in table.rows)


def _line(row: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(text) for text in row)} |"


def _plain(text: str) -> str:
    """Return the text on one line, safe inside a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
