"""A heat map: the mean of a metric for every pair of values of two config keys."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from neo.results.key_cells import (
    Cells,
    averages,
    best_cell,
    cells_of,
    key_scales,
    means_of,
    printed,
    where,
)
from neo.results.keyed_runs import KeyedRuns
from neo.results.metrics import Metric
from neo.results.scales import KeyScale, show_key_scale
from neo.results.shades import colour_bar, colours, number_scale

FRAME = "#D55E00"
MAX_CELLS = 30  # columns or rows of a heat map


def draw_heatmap(
    axes: Axes, runs: KeyedRuns, keys: Sequence[str], info: Metric, inches: float, unit_text: str
) -> list[str]:
    """Draw the mean over seeds in a cell for each pair of values, and return notes."""
    across, up = key_scales(runs)
    for key, scale in zip(keys, (across, up), strict=True):
        if len(scale.labels) > MAX_CELLS:
            raise ValueError(
                f"figures: a heatmap over {key!r} has {len(scale.labels)} columns or rows, "
                f"legal: at most {MAX_CELLS}; a sweep or parallel coordinates show more"
            )
    cells, failed = cells_of(runs.finished, [across, up]), cells_of(runs.failed, [across, up])
    means = means_of(cells)
    shown = number_scale(list(means.values()), info.better)
    norm, palette = shown.norm(), colours(info.better)
    equal = _same_everywhere(cells)
    size = min(10.0, inches / len(across.labels) * 72 / 4.4)  # six digits fit into the cell
    for x in range(len(across.labels)):
        for y in range(len(up.labels)):
            at, corner = (x, y), (x - 0.5, y - 0.5)
            ends = len(failed.get(at, []))
            if at in means:
                colour = palette(norm(means[at]))
                axes.add_patch(Rectangle(corner, 1, 1, fc=colour, ec="white", lw=1.5))
                lines = [printed(means[at], info)]
                lines += [] if equal else [f"n={len(cells[at])}"]
                lines += [f"✕ {ends}"] if ends else []
                ink = "black" if _luminance(colour) > 0.179 else "white"
                axes.text(x, y, "\n".join(lines), ha="center", va="center", color=ink, size=size)
            elif ends:
                axes.add_patch(Rectangle(corner, 1, 1, fc="#e4e4e4", ec="white", lw=1.5))
                axes.text(x, y, f"✕ {ends}", ha="center", va="center", color="#a00000", size=size)
    best = best_cell(means, info.better)
    if best is not None:
        x, y = best
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc="none", ec=FRAME, lw=3, zorder=3))
    # Cells are of one size, whatever the numbers' distances.
    show_key_scale(axes, "x", KeyScale(across.labels, across.labels), inches)
    show_key_scale(axes, "y", KeyScale(up.labels, up.labels), inches)
    if not up.is_numeric:
        axes.invert_yaxis()  # categories are read from the top, numbers grow upwards
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    colour_bar(axes, shown, info, unit_text)
    notes = []
    if best is not None:
        there = where(best, [across, up], keys)
        notes.append(f"framed: the best mean, {printed(means[best], info)} ({there})")
    if not equal:
        notes.append("n: runs in the mean")
    if failed:
        notes.append(f"✕ {runs.not_finished}")
    if len(cells.keys() | failed.keys()) < len(across.labels) * len(up.labels):
        notes.append("white: not run")
    return notes + averages(cells, keys)


def cell_lines(runs: KeyedRuns) -> int:
    """Return how many lines of text the fullest cells of a heat map have."""
    cells = cells_of(runs.finished, key_scales(runs))
    return 1 + (not _same_everywhere(cells)) + bool(runs.failed)


def _same_everywhere(cells: Cells) -> bool:
    return len({len(members) for members in cells.values()}) == 1


def _luminance(colour: Sequence[float]) -> float:
    """Return the relative luminance (WCAG 2.2); black and white contrast equally with 0.179."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
