"""Learning curves: what a run logged while it was trained, over steps or over tokens."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from neo.results.metrics import quantity
from neo.results.records import RunRecord

TOKENS = "train/tokens"

Curve = list[tuple[float, float]]
Looks = Mapping[str, tuple[str, str]]  # of a group's label: colour and dashes


@dataclass(frozen=True)
class MeanCurve:
    """The mean of curves and its standard deviation; no deviation for a single curve."""

    x: list[float]
    mean: list[float]
    std: list[float] | None


def read_curve(path: Path, name: str) -> Curve:
    """Return the logged (step, value) pairs of `name` in a `metrics.csv`; none if it has none.

    Raises:
        ValueError: A logged cell is not a number.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        pairs = [(float(r["step"]), float(r[name])) for r in rows if r.get("step") and r.get(name)]
    except ValueError as error:
        raise ValueError(f"{path}: column {name!r}: {error}") from error
    return [(step, value) for step, value in pairs if math.isfinite(value)]


def over_tokens(curve: Curve, counts: Curve) -> Curve:
    """Return the curve over the supervised tokens seen at its steps.

    Args:
        curve: (step, value) pairs.
        counts: (step, tokens) pairs, the step counted from 0, so that none was seen at step -1.
            Between logged counts, and past the last, the tokens grow evenly with the steps.
    """
    if not counts:
        return []
    known = [(-1.0, 0.0), *counts]
    last, seen = known[-1]
    known.append((last + 1.0, seen + seen / (last + 1.0)))
    return [(_read(known, step), value) for step, value in curve]


def mean_curve(curves: Sequence[Curve], *, same_x: bool) -> MeanCurve | None:
    """Return mean and deviation of the curves wherever all of them are known, or None.

    Args:
        curves: One or more, each sorted by x.
        same_x: Whether the runs logged at the same places, as over steps: then the mean stands at
            the places that all of them have. Otherwise each curve is the straight lines between
            its points, and the mean bends where one of them does.
    """
    if same_x:
        tables = [dict(curve) for curve in curves]
        places = sorted(set.intersection(*(set(table) for table in tables)))
        values = [[table[place] for table in tables] for place in places]
    else:
        start, end = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
        places = sorted({x for curve in curves for x, _ in curve if start <= x <= end})
        values = [[_read(curve, place) for curve in curves] for place in places]
    if not places:
        return None
    return MeanCurve(
        x=places,
        mean=[statistics.fmean(found) for found in values],
        std=[statistics.stdev(found) for found in values] if len(curves) > 1 else None,
    )


def group_curves(
    runs: Sequence[RunRecord], name: str, x: str, logs: Mapping[str, Path]
) -> tuple[list[Curve], dict[str, int]]:
    """Return the curve of `name` over `x` of each run, and how many runs lack what for it."""
    curves: list[Curve] = []
    without = {"a log": 0, name: 0, TOKENS: 0}
    for run in runs:
        if run.run_id not in logs:
            without["a log"] += 1
            continue
        curve = read_curve(logs[run.run_id], name)
        if not curve:
            without[name] += 1
            continue
        if x == "tokens":
            curve = over_tokens(curve, read_curve(logs[run.run_id], TOKENS))
        if curve:
            # The last of the values at one place, as a run that was resumed logs a step twice.
            curves.append(sorted(dict(curve).items()))
        else:
            without[TOKENS] += 1
    return curves, {what: number for what, number in without.items() if number}


def draw_curves(
    axes: Axes,
    name: str,
    x: str,
    groups: Mapping[str, list[Curve]],
    looks: Looks,
    legend_title: str = "",
) -> list[str]:
    """Draw a group's mean and one standard deviation around it; return notes on what is not drawn.

    Args:
        axes: To draw on.
        name: The metric.
        x: "step" or "tokens".
        groups: Label to the curves of its runs.
        looks: Label to colour and dashes.
        legend_title: Above the labels.
    """
    scale = quantity(name)[0].scale
    left_out = []
    alpha = 0.2 if len(groups) <= 7 else 0.1  # many bands would hide each other
    for label, curves in groups.items():
        if not curves:
            continue
        found = mean_curve(curves, same_x=x == "step")
        if found is None:
            left_out.append(f"left out: {label}, whose runs have no {x} in common")
            continue
        colour, dashes = looks[label]
        mean = [scale * value for value in found.mean]
        axes.plot(found.x, mean, color=colour, ls=dashes, lw=2, label=label)
        if found.std is not None:
            low = [m - scale * s for m, s in zip(mean, found.std, strict=True)]
            high = [m + scale * s for m, s in zip(mean, found.std, strict=True)]
            axes.fill_between(found.x, low, high, color=colour, alpha=alpha, lw=0)
    axes.set_xlabel("optimizer step" if x == "step" else "supervised tokens")
    if x == "tokens":
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#dddddd", lw=0.8)
    if axes.get_lines():
        if len(groups) > 7:
            beside(axes, legend_title)
        else:
            axes.legend(frameon=False, title=legend_title or None)
    return left_out


def beside(
    axes: Axes, title: str, entries: tuple[Sequence[Any], Sequence[str]] | None = None
) -> None:
    """Put the legend to the right of the axes, where it hides nothing.

    Args:
        axes: To draw on.
        title: Above the entries.
        entries: Handles and labels; all of the axes' own where None.
    """
    axes.legend(
        *(entries or axes.get_legend_handles_labels()),
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        borderaxespad=0.0,
        title=title or None,
        alignment="left",
        fontsize=10,
        handlelength=2.6,
    )


def _read(curve: Curve, place: float) -> float:
    """Return the value at `place` on the straight lines between the points; the end lines go on."""
    segments = list(pairwise(curve))
    if not segments:
        return curve[0][1]
    (x0, y0), (x1, y1) = next((s for s in segments if place <= s[1][0]), segments[-1])
    if place == x1:
        return y1
    return y0 + (y1 - y0) * (place - x0) / (x1 - x0)
