"""The figure beside a table, drawn from the same rows and records."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from neo.results.keyed_runs import require_key, shown_runs
from neo.results.panel_job import PanelJob
from neo.results.panel_spec import PanelSpec
from neo.results.tables import Table

STYLE = {"font.size": 11, "axes.titlesize": 12}
WIDTH = 10.0  # inches: 11 points stay legible where a README shrinks the figure to 830 pixels
DPI = 160


def draw_figure(table: Table, curves: Mapping[str, Path]) -> bytes | None:
    """Return the table's figure as PNG, or None where it has no panel with anything to show.

    Args:
        table: Rows and their runs; its spec lists the panels.
        curves: Run id to a copy of the run's `metrics.csv`, for the runs that have one.

    Raises:
        ValueError: A panel is over a key that no record has, or a log is no log.
    """
    figure = build_figure(table, table.spec.figures, curves)
    return None if figure is None else png(figure)


def draw_named(table: Table, curves: Mapping[str, Path]) -> dict[str, bytes]:
    """Return file name to PNG of each panel that has a name and something to show.

    The whole figure is to look at; a panel of its own is for a page, a paper or a slide.

    Raises:
        ValueError: As `draw_figure`, or two panels have the same name.
    """
    named = [panel for panel in table.spec.figures if panel.name]
    for name, number in Counter(panel.name for panel in named).items():
        if number > 1:
            raise ValueError(f"figures: {number} panels have the name {name!r}")
    drawn = {panel.name: build_figure(table, [panel], curves) for panel in named}
    return {f"figure-{name}.png": png(figure) for name, figure in drawn.items() if figure}


def build_figure(
    table: Table, panels: Sequence[PanelSpec], curves: Mapping[str, Path]
) -> Figure | None:
    """Return the panels as one figure, laid out line by line, or None without anything to show."""
    _require_keys(table, panels)
    jobs = [job for job in _jobs(table, panels, curves) if job.has_content]
    if not jobs:
        return None
    lines = _arrange(jobs)
    heights = [max(job.height for job in line) for line in lines]
    with style.context(["default", STYLE]):  # not the reader's own matplotlibrc
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", dpi=DPI)
        FigureCanvasAgg(figure)
        bands = figure.subfigures(len(lines), 1, height_ratios=heights, squeeze=False)[:, 0]
        for line, band in zip(lines, bands, strict=True):
            # Groups drawn side by side are there to be compared: on one scale.
            # Lines of seeds are sorted, so that each panel has labels of its own.
            same = len({id(job.panel) for job in line}) == 1
            same &= line[0].panel.kind not in ("seeds", "pareto")
            row = band.subplots(1, len(line), squeeze=False, sharey=same)[0]
            for job, axes in zip(line, row, strict=True):
                job.draw(axes)
    return figure


def png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    file = io.BytesIO()
    with style.context(["default", STYLE]):
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _require_keys(table: Table, panels: Sequence[PanelSpec]) -> None:
    """Raise ValueError where a panel is over a key that no record has."""
    runs = shown_runs(table)
    for panel in panels:
        for entry, keys in panel.keys.items():
            for key in keys:
                place = f"figures[{table.spec.figures.index(panel)}].{entry}"
                require_key(runs, key, place)


def _jobs(table: Table, panels: Sequence[PanelSpec], curves: Mapping[str, Path]) -> list[PanelJob]:
    """Return a panel of rows once for each group that competes in it, one over keys once."""
    groups = list(dict.fromkeys(row.spec.group for row in table.rows if not row.spec.reference))
    return [
        PanelJob(table, panel, group, curves)
        for panel in panels
        for group in ([""] if panel.over_keys else groups)
    ]


def _arrange(jobs: list[PanelJob]) -> list[list[PanelJob]]:
    """Return the panels line by line: wide ones take a whole one, others share it in twos."""
    lines: list[list[PanelJob]] = []
    for job in jobs:
        if lines and len(lines[-1]) == 1 and not (job.is_wide or lines[-1][0].is_wide):
            lines[-1].append(job)
        else:
            lines.append([job])
    return lines
