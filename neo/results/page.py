"""The page of an experiment, report.html: one file that opens without a network."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from neo.results.cells import against_lines, grid
from neo.results.notes import against_note, rule
from neo.results.page_data import page_data
from neo.results.panels import COLOURS
from neo.results.printing import Cell
from neo.results.records import RunRecord
from neo.results.tables import Table

PARTS = Path(__file__).parent / "page_parts"
SCRIPTS = ("logic.js", "chart.js", "details.js", "runs.js", "curves.js", "start.js")


def render_page(
    table: Table,
    records: Sequence[RunRecord],
    curves: Mapping[str, Path],
    notes: Sequence[str] = (),
) -> str:
    """Return the page as HTML: the tables over seeds, and every run with its config and curve.

    Args:
        table: Rows and their runs.
        records: All runs of the experiment, those that failed or match no row too.
        curves: Run id to a copy of the run's `metrics.csv`, for the runs that have one.
        notes: Lines to stand under the tables, such as what was chosen from them.

    Raises:
        ValueError: A log has a column that is no metric, or a cell that is no number.
    """
    data = page_data(table, records, curves)
    style = _colours() + (PARTS / "page.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "".join(
        (PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS
    )
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template((PARTS / "page.html").read_text(encoding="utf-8")).substitute(
        policy=policy,
        title=html.escape(table.spec.title),
        note=html.escape(table.spec.note),
        facts=_facts(table, records),
        summary=_summary(table, records, notes),
        thinned=html.escape(
            f"A curve of more than {data['points_per_curve']} points is thinned to its ends and "
            "the lowest and highest of each stretch. Tokens between logged steps lie on a line."
        ),
        settled=html.escape(
            "What is the same in all runs, or settled by one choice, stands in the details only."
        ),
        style=style,
        script=script,
        data=embedded(data),
    )


def embedded(data: Any) -> str:
    r"""Return the data as JSON that nothing inside can end or alter as a part of an HTML page.

    Example:
        >>> embedded({"error": "</script>"})
        '{"error":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 is escaped too
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _facts(table: Table, records: Sequence[RunRecord]) -> str:
    """Return one line: how many runs, and how they ended."""
    counts: dict[str, int] = {}
    for run in records:
        counts[run.status] = counts.get(run.status, 0) + 1
    parts = [f"<b>{len(records)}</b> runs"]
    parts += [f"<b>{counts[status]}</b> {html.escape(status)}" for status in sorted(counts)]
    if table.unmatched:
        parts.append(f"<b>{len(table.unmatched)}</b> in no row of the table")
    names = sorted({run.experiment_name for run in records})
    if names:
        parts.append(f"experiment {html.escape(', '.join(names))}")
    return " · ".join(parts)


def _summary(table: Table, records: Sequence[RunRecord], notes: Sequence[str]) -> str:
    """Return the tabs: the table, its comparison with the baseline, notes, origin, added text."""
    left = 2 if table.has_groups else 1
    turned = table.spec.transpose
    over_seeds = _table(*grid(table), left, turned=turned)
    panels = [("Over seeds", over_seeds + _small(rule(table)))]
    if table.spec.baseline:
        head, rows = against_lines(table)
        base = table.spec.baseline
        compared = _table([Cell(text) for text in head], rows, left)
        panels.append((f"Against {base}", compared + _small(against_note(table))))
    if notes:
        panels.append(("Notes", f'<pre class="card">{html.escape(chr(10).join(notes))}</pre>'))
    panels.append(("Origin", _origin(table, records)))
    if table.spec.included:
        panels.append(
            ("Added text", f'<pre class="card scroll">{html.escape(table.spec.included)}</pre>')
        )
    tabs = "".join(
        f'<button type="button" role="tab" id="tab{i}" aria-controls="panel{i}" '
        f'aria-selected="{"false" if i else "true"}">{html.escape(name)}</button>'
        for i, (name, _) in enumerate(panels)
    )
    shown = "".join(
        f'<div role="tabpanel" id="panel{i}" aria-labelledby="tab{i}">{content}</div>\n'
        for i, (_, content) in enumerate(panels)
    )
    return f'<div class="tabs" role="tablist" aria-label="Over seeds">{tabs}</div>\n{shown}'


def _table(
    head: Sequence[Cell],
    body: Sequence[Sequence[Cell]],
    left: int,
    *,
    turned: bool = False,
) -> str:
    """Return a table of printed cells, of which the first `left` columns are texts.

    Args:
        head: Headers; a unit in brackets goes under its label.
        body: Rows of cells.
        left: Number of columns that are no numbers.
        turned: Whether the labels with units stand at the left, and not above.
    """
    above, beside = (_marked, _header) if turned else (_header, _marked)
    kinds = ["" if i < left else ' class="number"' for i in range(len(head))]
    kinds[left - 1] = ' class="stick"'
    top = "".join(
        f'<th scope="col"{kind}>{above(cell)}</th>' for kind, cell in zip(kinds, head, strict=True)
    )
    rows = []
    for line in body:
        cells = []
        for k, (kind, cell) in enumerate(zip(kinds, line, strict=True)):
            if k == left - 1:
                cells.append(f'<th scope="row"{kind}>{beside(cell)}</th>')
            else:
                cells.append(f"<td{kind}>{_marked(cell)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<div class="scroll card" tabindex="0" role="region" aria-label="Table over seeds"><table>'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _small(text: str) -> str:
    return f'<p class="muted fine">{html.escape(text)}</p>'


def _header(cell: Cell) -> str:
    """Return a header with its unit and arrow in small letters under the label."""
    found = re.fullmatch(
        r"(?P<label>.*?)(?: \((?P<unit>[^()]*)\))?(?P<arrow> [↑↓])?", cell.text, re.S
    )
    assert found is not None  # every part may be empty
    under = f"{found['unit'] or ''}{found['arrow'] or ''}".strip()
    small = f"<small>{html.escape(under)}</small>" if under else ""
    return f"{html.escape(found['label'])}{small}"


def _marked(cell: Cell) -> str:
    """Return the cell with HTML's marks around what is bold or italic."""
    tag = "strong" if cell.bold else "em" if cell.italic else ""
    text = html.escape(cell.text)
    return (f"<{tag}>{text}</{tag}>" if tag else text) + html.escape(cell.rest)


def _origin(table: Table, records: Sequence[RunRecord]) -> str:
    """Return command, code, dates, devices and versions of all runs, as a list."""
    codes = {
        (run.commit[:7] if run.commit else "no commit known")
        + (" with local changes" if run.dirty else "")
        for run in records
    }
    versions = {f"{name} {version}" for run in records for name, version in run.versions.items()}
    started = [run.started_at for run in records]
    facts = {
        "Command": table.spec.command,
        "Code": ", ".join(sorted(codes)),
        "Runs": f"{len(started)}, started {min(started)} to {max(started)}" if started else "0",
        "Device": "; ".join(sorted({run.device or "not recorded" for run in records})),
        "Versions": ", ".join(sorted(versions)),
    }
    items = "".join(
        f"<li>{name}: {html.escape(value)}</li>\n" for name, value in facts.items() if value
    )
    return f'<ul class="card">\n{items}</ul>'


def _colours() -> str:
    """Return the colours of lines as CSS variables; yellow is too pale for a line on white."""
    shown = "".join(f"--c{i}:{colour};" for i, colour in enumerate(COLOURS[:6]))
    return f":root{{{shown}}}\n"


def _hash(text: str) -> str:
    """Return the source expression by which a content security policy allows the inline text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
