r"""A table as LaTeX, to be read into a paper by `\input`."""

import re
from collections.abc import Sequence

from neo.results.cells import against_lines, grid
from neo.results.notes import against_note, failures, origin, rule
from neo.results.printing import Cell
from neo.results.tables import Table

# From U+03B1 on, in its order.
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi mathrm{o} pi rho "
    "varsigma sigma tau upsilon phi chi psi omega"
)
_MATH = {
    "±": "pm", "\u00d7": "times", "·": "cdot", "≤": "leq", "≥": "geq", "≈": "approx", "∞": "infty",
    "↑": "uparrow", "↓": "downarrow", "→": "rightarrow", "Δ": "Delta", "Σ": "Sigma",
}  # fmt: skip
_TEXT = {
    "\\": "textbackslash", "~": "textasciitilde", "^": "textasciicircum", "`": "textasciigrave",
    "<": "textless", ">": "textgreater", "|": "textbar", "—": "textemdash",
    "\u2013": "textendash", "…": "ldots",
}  # fmt: skip
_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {character: f"\\{name}{{}}" for character, name in _TEXT.items()}
    | {character: f"$\\{name}$" for character, name in _MATH.items()}
    | {chr(0x3B1 + i): f"$\\{name}$" for i, name in enumerate(_GREEK.split())}
    | {"\u2212": "$-$"}
)


def render_latex(table: Table, name: str, notes: Sequence[str] = ()) -> str:
    """Return the table as a LaTeX float, a second one for the comparison with a baseline.

    What the runs were made from stands in comments. A table that is wider than the text is shrunk
    to it. The file that the table includes is Markdown and left out.

    Args:
        table: Rows and their runs.
        name: Of the experiment; `tab:NAME` is the label of the table, `tab:NAME-against` that of
            the comparison.
        notes: Lines to stand under the table, such as what was chosen from it.
    """
    spec = table.spec
    label = "tab:" + re.sub(r"[^A-Za-z0-9_-]", "-", name)
    under = [spec.note, rule(table)]
    if table.failed:
        under.append(f"Runs that did not finish: {'; '.join(failures(table))}.")
    under += [text.removeprefix("* ") for text in notes]
    parts = [
        f"Rendered by python -m neo.report {name} from the records of the runs; not to be edited.",
        "It needs the packages booktabs and graphicx.",
        *origin(table),
    ]
    text = "".join(f"% {' '.join(part.split())}\n" for part in parts)
    text += _float(table, spec.title, label, *grid(table), under)
    if spec.baseline:
        title = f"{spec.title}. Against {spec.baseline}, seed by seed"
        head, body = against_lines(table)
        cells = [Cell(text) for text in head]
        text += "\n" + _float(table, title, f"{label}-against", cells, body, [against_note(table)])
    return text


def escape(text: str) -> str:
    """Return the text on one line, so that LaTeX prints it as it stands."""
    escaped = " ".join(text.split()).translate(_ESCAPES)
    return re.sub(r"([-'])(?=\1)", r"\1{}", escaped)  # which would be drawn as one character


def _float(
    table: Table,
    title: str,
    label: str,
    head: list[Cell],
    body: list[list[Cell]],
    under: Sequence[str],
) -> str:
    left = 2 if table.has_groups else 1
    rows = [r"\toprule", _row([_cell(cell, is_number=False) for cell in head]), r"\midrule"]
    above = None
    for cells in body:
        first, *rest = [_cell(cell, is_number=i >= left) for i, cell in enumerate(cells)]
        if table.has_groups:  # which is named in its first row only
            if above is not None and first != above:
                rows.append(r"\midrule")
            first, above = ("" if first == above else first), first
        rows.append(_row([first, *rest]))
    rows.append(r"\bottomrule")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape(title)}}}",
            rf"\label{{{label}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(head) - left)}}}",
            *rows,
            r"\end{tabular}}",
            r"\par\smallskip",
            r"\begin{minipage}{\linewidth}",
            r"\footnotesize",
            "\n\n".join(_prose(text) for text in under if text.strip()),
            r"\end{minipage}",
            r"\end{table}",
            "",
        ]
    )


def _row(cells: Sequence[str]) -> str:
    text = " & ".join(cells) + r" \\"
    # After the line above, these two would be read as an option of its end.
    return "{}" + text if text.startswith(("[", "*")) else text


def _cell(cell: Cell, *, is_number: bool) -> str:
    text, rest = escape(cell.text), escape(cell.rest)
    if is_number:  # a minus is longer than a hyphen
        text, rest = (re.sub(r"(?<![\w.-])-(?=\d)", "$-$", part) for part in (text, rest))
    if cell.bold:
        text = rf"\textbf{{{text}}}"
    if cell.italic:
        text = rf"\emph{{{text}}}"
    return f"{text} {rest}" if rest else text


def _prose(text: str) -> str:
    """Return a paragraph; what stands between backticks there is code."""
    mark = re.escape(escape("`"))
    return re.sub(rf"{mark}(.+?){mark}", r"\\texttt{\1}", escape(text))
