"""A table on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from neo.results.cells import against_lines, cells, count
from neo.results.choice import Choice, notes
from neo.results.notes import failures, outstanding
from neo.results.printing import Cell
from neo.results.tables import Table


def print_table(table: Table, choices: list[Choice]) -> None:
    """Print the table, a group at a time and turned.

    A terminal has room for many lines and for few columns.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file has no edge to wrap at
    shown = cells(table)
    groups = dict.fromkeys(row.spec.group for row in table.rows if not row.spec.reference)
    for group in groups or [""]:
        rows = [
            (row, line)
            for row, line in zip(table.rows, shown, strict=True)
            if row.spec.group == group or (row.spec.reference and not row.spec.group)
        ]
        title = (
            f"{table.spec.title} ({table.spec.group_label}: {group})" if group else table.spec.title
        )
        turned = RichTable(title=title, title_justify="left")
        turned.add_column("", no_wrap=True)
        for row, _ in rows:
            n = "" if row.spec.is_quoted else f", n={count(row)}"
            label = _styled(Cell(row.spec.label, italic=row.spec.is_quoted))
            turned.add_column(f"{label}{n}", justify="right")
        for number, column in enumerate(table.spec.columns):
            turned.add_row(column.header, *(_styled(line[number]) for _, line in rows))
        console.print(turned)
    if table.spec.baseline:
        head, body = against_lines(table)
        against = RichTable(title=f"Against {table.spec.baseline}", title_justify="left")
        for text in head:
            against.add_column(text, no_wrap=not text)
        for cells_of_row in body:
            against.add_row(*(_styled(cell) for cell in cells_of_row))
        console.print(against)
    for text in notes(table.spec.choose, choices) if table.spec.choose else []:
        console.print(text, markup=False)
    for text in outstanding(table):
        console.print(text, markup=False)
    for text in failures(table):
        console.print(f"not finished: {text}", markup=False)
    for run in table.unmatched:
        console.print(f"matches no row: {run.run_id}, seed {run.seed}, {run.choices}", markup=False)


def _styled(cell: Cell) -> str:
    """Return the cell with rich's marks, and nothing in it read as markup."""
    text, mark = escape(cell.text), "bold" if cell.bold else "italic" if cell.italic else ""
    return (f"[{mark}]{text}[/{mark}]" if mark else text) + escape(cell.rest)
