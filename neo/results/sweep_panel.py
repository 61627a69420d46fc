"""A metric against a swept config key, a line per value of another."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from neo.results.curves import beside
from neo.results.key_cells import (
    averages,
    best_cell,
    cells_of,
    key_scales,
    means_of,
    printed,
    where,
)
from neo.results.keyed_runs import KeyedRun, KeyedRuns, MeasuredRun
from neo.results.looks import group_looks
from neo.results.metrics import Metric
from neo.results.scales import INCHES_PER_CHARACTER, KeyScale, show_key_scale
from neo.results.shades import NumberScale, number_scale

MAX_JOINED = 12  # values of a key that a line is drawn through


def draw_sweep(
    axes: Axes, runs: KeyedRuns, keys: Sequence[str], info: Metric, inches: float, by_label: str
) -> list[str]:
    """Draw each run faintly, means and deviations as a line per group; return notes.

    Args:
        axes: To draw on.
        runs: With the values of `keys`: the swept one, and the one that groups if there are two.
        keys: One or two.
        info: What the number is.
        inches: Width of the axes, roughly.
        by_label: What the legend says before the groups; empty without groups.
    """
    along, *groups = key_scales(runs)
    cells = cells_of(runs.finished, [along, *groups])
    means = means_of(cells)
    shown = number_scale([keyed.number for keyed in runs.finished], info.better)
    labels = groups[0].labels if groups else [""]
    # Categories have room beside one another. A line between them would claim an order that they
    # do not have; one through the many values of a random search would claim to know between them.
    step = 0.0 if along.is_numeric else min(0.14, 0.8 / len(labels))
    joined = along.is_numeric and len(along.values) <= MAX_JOINED
    shifts = [step * (g - (len(labels) - 1) / 2) for g in range(len(labels))]
    for g, (label, (colour, dashes, marker)) in enumerate(group_looks(labels).items()):
        line = sorted(at for at in cells if not groups or at[1] == g)
        places = [along.places[at[0]] + shifts[g] for at in line]
        dots = [(x, k.number) for x, at in zip(places, line, strict=True) for k in cells[at]]
        axes.scatter(
            [x for x, _ in dots], [n for _, n in dots], s=26, color=colour, alpha=0.35, lw=0
        )
        axes.errorbar(
            places,
            [means[at] for at in line],
            [_std(cells[at]) for at in line],
            color=colour,
            ls=dashes if joined else "none",
            marker=marker,
            ms=5.5,
            lw=1.6,
            elinewidth=1.1,
            capsize=2.5,
            label=label,
        )
    show_key_scale(axes, "x", along, inches)
    _limit(axes, shown, room_below=bool(runs.failed))
    best = best_cell(means, info.better)
    notes = []
    if best is not None:
        axes.plot(
            [along.places[best[0]] + shifts[best[1] if groups else 0]],
            [means[best]],
            marker="o",
            ms=12,
            mfc="none",
            mec="black",
            mew=1.8,
            ls="none",
            zorder=4,
        )
        there = where(best, [along, *groups], keys)
        notes.append(f"circled: the best mean, {printed(means[best], info)} ({there})")
    _count(axes, along, runs.failed, "✕", 0.012, "#a00000")
    _count(axes, along, [k for k in runs.finished if k.number > shown.high], "▲", 1.01)
    _count(axes, along, [k for k in runs.finished if k.number < shown.low], "▼", 0.012)
    axes.grid(color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    if groups:
        _legend(axes, by_label, inches)
    if any(len(members) > 1 for members in cells.values()):
        notes.append("bars: one standard deviation")
    signs = "▲" * bool(shown.num_above) + "▼" * bool(shown.num_below)
    if signs:
        notes.append(f"{signs}: so many runs lie beyond the edge")
    if runs.failed:
        notes.append(f"✕ {runs.not_finished}")
    return notes + averages(cells, keys)


def _legend(axes: Axes, title: str, inches: float) -> None:
    """Put the groups in one line above the axes, or beside them where they are too many."""
    handles, labels = axes.get_legend_handles_labels()
    characters = len(title) + sum(len(label) + 6 for label in labels)
    if characters * INCHES_PER_CHARACTER > inches:
        beside(axes, title)
        return
    axes.legend(
        [Line2D([], [], ls="none"), *handles],
        [f"{title}:", *labels],
        loc="lower left",
        bbox_to_anchor=(-0.06, 1.03),
        ncols=len(labels) + 1,
        frameon=False,
        borderaxespad=0.0,
        borderpad=0.0,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1.0,
    )


def _std(members: Sequence[MeasuredRun]) -> float:
    """Return the deviation, or NaN, which is drawn as nothing, for a single run."""
    return statistics.stdev(k.number for k in members) if len(members) > 1 else float("nan")


def _limit(axes: Axes, shown: NumberScale, *, room_below: bool) -> None:
    """Give the upward axis the range that is shown where runs lie beyond it, and a little room."""
    if shown.log:
        axes.set_yscale("log")
    low, high = axes.get_ylim()
    if shown.num_below + shown.num_above:
        low, high = shown.low, shown.high
    turn, back = (math.log, math.exp) if shown.log else (float, float)
    room = 0.08 * (turn(high) - turn(low))
    below = room if room_below or shown.num_below + shown.num_above else 0.0
    above = room if shown.num_below + shown.num_above else 0.0
    axes.set_ylim(back(turn(low) - below), back(turn(high) + above))


def _count(
    axes: Axes,
    along: KeyScale,
    runs: Sequence[KeyedRun],
    sign: str,
    height: float,
    colour: str = "#555555",
) -> None:
    """Write at a height of the axes, for each value of the key, how many of the runs have it."""
    for index, count in Counter(along.index(keyed.values[0]) for keyed in runs).items():
        axes.text(
            along.places[index],
            height,
            f"{sign}{count if count > 1 else ''}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=9,
            color=colour,
            zorder=5,
        )
