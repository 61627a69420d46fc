"""Tables rendered from records: mean and standard deviation over seeds, never typed by hand."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from neo.results import against
from neo.results.against import Comparison
from neo.results.markdown import MISSING, line, number, plain
from neo.results.records import RunRecord
from neo.results.summary import ABSENT, TableRow, lookup, spelt_values, summarize
from neo.results.table_spec import ColumnSpec, RowSpec, Scalar, TableSpec


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

    def comparisons(self, column: ColumnSpec) -> dict[int, Comparison | None]:
        """Return how each row that is compared in `column` differs from the baseline, by index."""
        if not column.compare:
            return {}
        return against.compare(self.rows, self.spec.baseline, column)

    def best(self, column: ColumnSpec) -> set[int]:
        """Return the indices of the rows that are clearly good in `column`.

        With a baseline: the rows that are better than it by the paired test, so none in a column
        that is not compared. Without: the best row of each group, if that is clear: at least two
        runs each, and a gap to the second that is larger than both standard deviations and shows
        in the printed digits. Reference rows do not compete.
        """
        if self.spec.baseline:
            found = self.comparisons(column).items()
            return {i for i, shown in found if shown is not None and shown.is_better(column)}
        winners: set[int] = set()
        if column.source == "config":
            return winners
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
            printed = [number(mean * column.scale, column.decimals) for mean in (best, second)]
            if printed[0] != printed[1] and abs(best - second) > max(best_std, second_std):
                winners.add(i)
        return winners


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


def cells(table: Table) -> list[list[str]]:
    """Return the printed cells, row by row, with `**` around the clearly good."""
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


def render_markdown(table: Table, notes: Sequence[str] = ()) -> str:
    """Return the table as Markdown, with what it was made from under it.

    Args:
        table: Rows and their runs.
        notes: Lines to stand under the table, such as what was chosen from it.
    """
    spec = table.spec
    head = headers(table)
    left = 2 if _has_groups(table) else 1
    parts = [f"# {spec.title}", ""]
    parts += [line(head), line(["---"] * left + ["--:"] * (len(head) - left))]
    parts += [line(row) for row in lines(table)]
    parts += ["", *_notes(table)]
    if spec.baseline:
        head, body = against_lines(table)
        parts += ["", f"## Against {spec.baseline}, seed by seed", ""]
        parts += [line(head), line(["---"] * left + ["--:"] * (len(head) - left))]
        parts += [line(row) for row in body]
        parts += ["", _against_note(table)]
    if table.failed:
        parts += ["", "Runs that did not finish:", ""]
        parts += [
            f"- {plain(label)}, seed {run.seed}, run {run.run_id}: {run.status}"
            + (f" ({plain(run.error)})" if run.error else "")
            for label, run in table.failed
        ]
    if notes:
        parts += ["", *notes]
    parts += ["", *_origin(table)]
    if spec.included:
        parts += ["", spec.included.strip("\n")]
    return "\n".join(parts) + "\n"


def against_lines(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return headers and printed rows of the comparison with the baseline."""
    columns = [column for column in table.spec.columns if column.compare]
    found = {column.key: table.comparisons(column) for column in columns}
    head = [table.spec.group_label] if _has_groups(table) else []
    head += ["", "n", *(text for column in columns for text in against.headers(column))]
    body = []
    for i, row in enumerate(table.rows):
        if all(i not in compared for compared in found.values()):
            continue  # the baseline itself, or a reference
        n = max(shown.paired.n if (shown := found[c.key][i]) else 0 for c in columns)
        texts = [text for c in columns for text in against.cells(found[c.key][i], c, n)]
        group = [row.spec.group] if _has_groups(table) else []
        body.append([*group, row.spec.label, str(n) if n else MISSING, *texts])
    return head, body


def render_csv(table: Table) -> str:
    """Return the table as CSV: recorded units, all digits, mean, std and n per column.

    A column with `range` has its lowest and highest number, too. A compared one has the mean
    difference to the baseline, the ends of its interval, p, p after Holm's correction, and the
    number of pairs. A config value stands there once.
    """
    lines = [_csv_line(table, i) for i in range(len(table.rows))]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_line(table: Table, i: int) -> dict[str, float | int | str | None]:
    row = table.rows[i]
    found: dict[str, float | int | str | None] = {"group": row.spec.group, "row": row.spec.label}
    for column in table.spec.columns:
        key = column.key
        if column.source == "config":
            found[key] = spelt_values(row.runs, key)
            continue
        summary = summarize(row.runs, key)
        found |= {key: summary.mean, f"{key}_std": summary.std, f"{key}_n": summary.n}
        if column.range:
            found |= {f"{key}_low": summary.low, f"{key}_high": summary.high}
        if column.compare:
            shown = table.comparisons(column).get(i)
            paired = shown.paired if shown else None
            found |= {
                f"{key}_difference": paired.difference if paired else None,
                f"{key}_difference_low": paired.low if paired else None,
                f"{key}_difference_high": paired.high if paired else None,
                f"{key}_p": paired.p if paired else None,
                f"{key}_p_holm": shown.p_holm if shown else None,
                f"{key}_pairs": paired.n if paired else None,
            }
    return found


def _cell(row: TableRow, column: ColumnSpec, *, bold: bool) -> str:
    if column.source == "config":
        return spelt_values(row.runs, column.key) or MISSING
    summary = summarize(row.runs, column.key)
    text = MISSING
    if summary.mean is not None:
        text = _printed(summary.mean, column)
        if summary.std:  # none for a single run, 0 for counts that the config fixes
            text += f" ± {_printed(summary.std, column)}"
        if bold:
            text = f"**{text}**"
        if column.range and summary.std and summary.low is not None and summary.high is not None:
            text += f" [{_printed(summary.low, column)}, {_printed(summary.high, column)}]"
        if summary.n != len(row.runs):
            text += f" (n={summary.n})"
    if column.key in row.spec.paper:
        paper = row.spec.paper[column.key]
        text += f" (paper {number(paper, column.decimals)}"
        if summary.mean is not None:
            text += f", {summary.mean * column.scale - paper:+,.{column.decimals}f}"
        text += ")"
    return text


def _printed(recorded: float, column: ColumnSpec) -> str:
    return number(recorded * column.scale, column.decimals)


def _notes(table: Table) -> list[str]:
    spec = table.spec
    rule = (
        f"Mean ± sample standard deviation over n seeds, without ± where all are equal; {MISSING} "
        "was not measured."
    )
    if any(column.range for column in spec.columns):
        rule += " In square brackets the lowest and the highest seed."
    if spec.baseline:
        rule += f" Bold: better than {spec.baseline} by the paired test of the second table."
    else:
        rule += (
            " Bold: the best mean of its column"
            + (" and group" if _has_groups(table) else "")
            + ", where best and second have at least two seeds and lie further apart than both "
            "standard deviations."
        )
    if any(row.reference for row in spec.rows):
        rule += " Rows in italics are for reference and do not compete."
    if any(row.paper for row in spec.rows):
        rule += " In brackets the paper's number and ours minus it."
    return ([spec.note, ""] if spec.note else []) + [rule]


def _against_note(table: Table) -> str:
    columns = [column for column in table.spec.columns if column.compare]
    found = [shown for column in columns for shown in table.comparisons(column).values()]
    pairs = max((shown.paired.n for shown in found if shown is not None), default=0)
    return against.note(table.spec.baseline, pairs)


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
        any(_same(lookup(run, key), value) for value in values) for key, values in where.items()
    )


def _same(left: Any, right: Scalar) -> bool:
    # True == 1 in Python, but not in a config.
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _name(row: RowSpec) -> str:
    return f"{row.group}, {row.label}" if row.group else row.label


def _has_groups(table: Table) -> bool:
    return any(row.spec.group for row in table.rows)
