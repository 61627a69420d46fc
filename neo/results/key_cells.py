"""The runs of a panel by their values of its keys, and the mean of each combination."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

from neo.results.keyed_runs import KeyedRun, KeyedRuns, MeasuredRun, averaged_over
from neo.results.metrics import Metric
from neo.results.printing import number
from neo.results.scales import KeyScale, key_scale

Cell = tuple[int, ...]  # which value of each key
Cells = Mapping[Cell, Sequence[MeasuredRun]]
Run = TypeVar("Run", bound=KeyedRun)


def cells_of(runs: Sequence[Run], scales: Sequence[KeyScale]) -> dict[Cell, list[Run]]:
    """Return the runs by which value of each key they have."""
    found: dict[Cell, list[Run]] = {}
    for keyed in runs:
        at = tuple(s.index(value) for s, value in zip(scales, keyed.values, strict=True))
        found.setdefault(at, []).append(keyed)
    return found


def key_scales(runs: KeyedRuns) -> list[KeyScale]:
    """Return the scale of each key, over all runs that have it, failed ones too."""
    return [
        key_scale(list(values))
        for values in zip(*(keyed.values for keyed in runs.finished + runs.failed), strict=True)
    ]


def means_of(cells: Cells) -> dict[Cell, float]:
    """Return the mean number of each cell, in its printed unit."""
    return {at: statistics.fmean(k.number for k in members) for at, members in cells.items()}


def best_cell(means: Mapping[Cell, float], better: str | None) -> Cell | None:
    """Return the cell with the best mean, or None where neither end is the better one."""
    if better is None or not means:
        return None
    return (min if better == "lower" else max)(means, key=lambda at: means[at])


def averages(cells: Cells, keys: Sequence[str]) -> list[str]:
    """Return the note on what else differs between the runs of one mean; none where nothing."""
    over = averaged_over([[k.run for k in members] for members in cells.values()], keys)
    return [f"means run over {', '.join(over)}, too"] if over else []


def where(at: Cell, scales: Sequence[KeyScale], keys: Sequence[str]) -> str:
    """Return the values of the cell's keys in words."""
    named = zip(keys, at, scales, strict=True)
    return ", ".join(f"{key} {scale.labels[i]}" for key, i, scale in named)


def printed(value: float, info: Metric) -> str:
    """Return the number as the tables print it."""
    return number(value, info.decimals)
