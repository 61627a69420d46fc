"""The figure beside a table, drawn from the same rows and records."""

import io
import textwrap
from collections.abc import Mapping
from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from neo.results.metrics import quantity
from neo.results.panel_spec import PanelSpec
from neo.results.panels import (
    COLOURS,
    HATCHES,
    draw_bars,
    draw_curves,
    draw_scatter,
    draw_seeds,
    expand,
    row_curves,
)
from neo.results.summary import TableRow, summarize
from neo.results.tables import Table

STYLE = {"font.size": 11, "axes.titlesize": 12}
WIDTH = 10.0  # inches: 11 points stay legible where a README shrinks the figure to 830 pixels
DPI = 160

Job = tuple[PanelSpec, str]


def draw_figure(table: Table, curves: Mapping[str, Path]) -> bytes | None:
    """Return the table's figure as PNG, or None where it has no panel with anything to show.

    Args:
        table: Rows and their runs; its spec lists the panels.
        curves: Run id to a copy of the run's `metrics.csv`, for the runs that have one.
    """
    jobs = [job for job in _jobs(table) if _has_content(table, job, curves)]
    if not jobs:
        return None
    lines = _arrange(jobs)
    heights = [max(_height(table, job) for job in line) for line in lines]
    with style.context(["default", STYLE]):  # not the reader's own matplotlibrc
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", dpi=DPI)
        FigureCanvasAgg(figure)
        bands = figure.subfigures(len(lines), 1, height_ratios=heights, squeeze=False)[:, 0]
        for line, band in zip(lines, bands, strict=True):
            # Groups drawn side by side are there to be compared: on one scale.
            # Lines of seeds are sorted, so that each panel has labels of its own.
            same = len({id(panel) for panel, _ in line}) == 1 and line[0][0].kind != "seeds"
            row = band.subplots(1, len(line), squeeze=False, sharey=same)[0]
            for job, axes in zip(line, row, strict=True):
                _draw(axes, table, job, curves)
        png = io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _height(table: Table, job: Job) -> float:
    """Return the height of the panel in inches; a line of seeds needs room for its label."""
    panel, group = job
    if panel.kind == "seeds":
        return 1.4 + 0.29 * len(_rows(table, group)[0])
    return 3.9 if panel.kind == "bars" else 3.5


def _jobs(table: Table) -> list[Job]:
    """Return every panel once for each group of rows that compete in it."""
    groups = list(dict.fromkeys(row.spec.group for row in table.rows if not row.spec.reference))
    return [(panel, group) for panel in table.spec.figures for group in groups]


def _arrange(jobs: list[Job]) -> list[list[Job]]:
    """Return the panels line by line: bars take a whole one, others share it in twos."""
    lines: list[list[Job]] = []
    for job in jobs:
        shares = lines and len(lines[-1]) == 1 and "bars" not in (job[0].kind, lines[-1][0][0].kind)
        if shares:
            lines[-1].append(job)
        else:
            lines.append([job])
    return lines


def _rows(table: Table, group: str) -> tuple[list[TableRow], list[TableRow]]:
    """Return the competing rows of the group, and the reference rows that go with it."""
    own = [row for row in table.rows if not row.spec.reference and row.spec.group == group]
    return own, [r for r in table.rows if r.spec.reference and r.spec.group in ("", group)]


def _has_content(table: Table, job: Job, curves: Mapping[str, Path]) -> bool:
    panel, group = job
    own, references = _rows(table, group)
    if panel.kind == "curves":
        return any(row_curves(row, panel.y, curves) for row in own)
    if panel.kind == "scatter":
        return any(
            all(summarize(row.runs, name).n for name in (*panel.x, panel.y))
            for row in own + references
        )
    names = expand(panel.x, own)
    return any(summarize(row.runs, name).n for row in own for name in names)


def _draw(axes: Axes, table: Table, job: Job, curves: Mapping[str, Path]) -> None:
    panel, group = job
    own, references = _rows(table, group)
    styles = _styles(table)
    labels = {column.key: column.label for column in table.spec.columns}
    if panel.kind == "bars":
        names = expand(panel.x, own)
        draw_bars(axes, names, own, references, styles)
        axes.set_ylabel(_axis_label(names[0], {names[0]: _metric_label(names[0])}))
    elif panel.kind == "curves":
        draw_curves(axes, panel.y, own, styles, curves)
        axes.set_ylabel(_axis_label(panel.y, labels))
    elif panel.kind == "seeds":
        draw_seeds(axes, panel.x[0], own, table.spec.baseline)
        axes.set_xlabel(_axis_label(panel.x[0], labels))
    else:
        draw_scatter(axes, panel.x[0], panel.y, own + references, styles)
        axes.set_xlabel(_axis_label(panel.x[0], labels))
        axes.set_ylabel(_axis_label(panel.y, labels))
    title = panel.title or _panel_title(panel, labels)
    wide = panel.kind == "bars"
    # Bars and seeds have their legend between title and axes.
    pad = 24.0 if panel.kind in ("bars", "seeds") else 8.0
    title = textwrap.fill(f"{title}: {group}" if group else title, 90 if wide else 50)
    axes.set_title(title, loc="left", pad=pad, weight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def _styles(table: Table) -> dict[str, tuple[str, str]]:
    """Return colour and hatch per label, so that a label looks the same in every panel."""
    labels = dict.fromkeys(row.spec.label for row in table.rows if not row.spec.reference)
    return {
        label: (COLOURS[i % len(COLOURS)], HATCHES[i // len(COLOURS) % len(HATCHES)])
        for i, label in enumerate(labels)
    }


def _metric_label(name: str) -> str:
    parts = name.split("/")
    return parts[2].replace("_", " ") if parts[0] == "eval" else name


def _panel_title(panel: PanelSpec, labels: Mapping[str, str]) -> str:
    if panel.kind == "bars":
        parts = panel.x[0].split("/")
        return _metric_label(panel.x[0]) + (f" on {parts[1]}" if parts[0] == "eval" else "")
    name = panel.x[0] if panel.kind == "seeds" else panel.y
    return labels.get(name, name)


def _axis_label(name: str, labels: Mapping[str, str]) -> str:
    """Return the table's label of `name` with the unit of what is drawn."""
    info, _ = quantity(name)
    text = labels.get(name, name)
    return f"{text} ({info.printed_unit})" if info.printed_unit else text
