"""A table as Markdown."""

from collections.abc import Sequence

from neo.results.cells import against_lines, grid
from neo.results.notes import against_note, failures, origin, rule
from neo.results.printing import Cell
from neo.results.tables import Table


def render_markdown(table: Table, notes: Sequence[str] = ()) -> str:
    """Return the table as Markdown, with what it was made from under it.

    Args:
        table: Rows and their runs.
        notes: Lines to stand under the table, such as what was chosen from it.
    """
    spec = table.spec
    parts = [f"# {spec.title}", "", *_grid(table, *grid(table)), ""]
    parts += [spec.note, ""] if spec.note else []
    parts += [rule(table)]
    if spec.baseline:
        parts += ["", f"## Against {spec.baseline}, seed by seed", ""]
        head, body = against_lines(table)
        parts += [*_grid(table, [Cell(text) for text in head], body), "", against_note(table)]
    if table.failed:
        parts += ["", "Runs that did not finish:", ""]
        parts += [f"- {plain(text)}" for text in failures(table)]
    if notes:
        parts += ["", *notes]
    parts += ["", *(f"- {fact}" for fact in origin(table))]
    if spec.included:
        parts += ["", spec.included.strip("\n")]
    return "\n".join(parts) + "\n"


def marked(cell: Cell) -> str:
    """Return the cell with Markdown's marks around what is bold or italic."""
    mark = "**" if cell.bold else "*" if cell.italic else ""
    return f"{mark}{cell.text}{mark}{cell.rest}"


def line(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(plain(text) for text in cells)} |"


def plain(text: str) -> str:
    """Return the text on one line, safe inside a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _grid(table: Table, head: list[Cell], body: list[list[Cell]]) -> list[str]:
    left = 2 if table.has_groups else 1
    rule = line(["---"] * left + ["--:"] * (len(head) - left))
    first, *others = (line([marked(cell) for cell in row]) for row in (head, *body))
    return [first, rule, *others]
