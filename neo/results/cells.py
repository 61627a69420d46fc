"""The cells of a table and of its comparison with the baseline, in no format yet."""

from collections import Counter

from neo.results import against
from neo.results.printing import MISSING, Cell, number
from neo.results.summary import TableRow, spelt_values, summarize
from neo.results.table_spec import ColumnSpec
from neo.results.tables import Table


def grid(table: Table) -> tuple[list[Cell], list[list[Cell]]]:
    """Return the head and the lines of the table as they are read, turned where it says so."""
    head, body = [Cell(text) for text in headers(table)], lines(table)
    if not table.spec.transpose:
        return head, body
    first, *others = ([*line] for line in zip(head, *body, strict=True))
    return first, others


def headers(table: Table) -> list[str]:
    """Return the printed headers: group where there is one, row, n, and the columns."""
    group = [table.spec.group_label] if table.has_groups else []
    return [*group, "", "n", *(column.header for column in table.spec.columns)]


def lines(table: Table) -> list[list[Cell]]:
    """Return the rows under `headers`, references in italics."""
    return [
        [
            *([Cell(row.spec.group)] if table.has_groups else []),
            Cell(row.spec.label, italic=row.spec.reference),
            Cell(count(row)),
            *row_cells,
        ]
        for row, row_cells in zip(table.rows, cells(table), strict=True)
    ]


def cells(table: Table) -> list[list[Cell]]:
    """Return what the columns show, row by row, the clearly good in bold."""
    best = [table.best(column) for column in table.spec.columns]
    return [
        [_cell(row, column, bold=i in best[c]) for c, column in enumerate(table.spec.columns)]
        for i, row in enumerate(table.rows)
    ]


def count(row: TableRow) -> str:
    """Return how many runs of the row finished and how many did not, as in "3 (1 oom)"."""
    if row.spec.is_quoted:
        return MISSING
    ends = Counter(run.status for run in row.failed)
    failed = ", ".join(f"{ends[status]} {status}" for status in sorted(ends))
    return f"{len(row.runs)} ({failed})" if failed else str(len(row.runs))


def against_lines(table: Table) -> tuple[list[str], list[list[Cell]]]:
    """Return headers and rows of the comparison with the baseline."""
    columns = [column for column in table.spec.columns if column.compare]
    found = {column.key: table.comparisons(column) for column in columns}
    head = [table.spec.group_label] if table.has_groups else []
    head += ["", "n", *(text for column in columns for text in against.headers(column))]
    body = []
    for i, row in enumerate(table.rows):
        if all(i not in compared for compared in found.values()):
            continue  # the baseline itself, or a reference
        n = max(shown.paired.n if (shown := found[c.key][i]) else 0 for c in columns)
        shown_cells = [cell for c in columns for cell in against.cells(found[c.key][i], c, n)]
        group = [Cell(row.spec.group)] if table.has_groups else []
        body.append([*group, Cell(row.spec.label), Cell(str(n) if n else MISSING), *shown_cells])
    return head, body


def _cell(row: TableRow, column: ColumnSpec, *, bold: bool) -> Cell:
    if row.spec.is_quoted:
        given = row.spec.quoted.get(column.key)
        return Cell(MISSING) if given is None else Cell(_printed(given, column), italic=True)
    if column.source == "config":
        return Cell(spelt_values(row.runs, column.key) or MISSING)
    summary = summarize(row.runs, column.key)
    text, rest = MISSING, ""
    if summary.mean is not None:
        text = _printed(summary.mean, column)
        if summary.std:  # none for a single run, 0 for counts that the config fixes
            text += f" ± {_printed(summary.std, column)}"
        if column.range and summary.std and summary.low is not None and summary.high is not None:
            rest += f" [{_printed(summary.low, column)}, {_printed(summary.high, column)}]"
        if summary.n != len(row.runs):
            rest += f" (n={summary.n})"
    if column.key in row.spec.paper:
        paper = row.spec.paper[column.key]
        rest += f" (paper {number(paper, column.decimals)}"
        if summary.mean is not None:
            rest += f", {summary.mean * column.scale - paper:+,.{column.decimals}f}"
        rest += ")"
    return Cell(text, bold=bold, rest=rest)


def _printed(recorded: float, column: ColumnSpec) -> str:
    return number(recorded * column.scale, column.decimals)
