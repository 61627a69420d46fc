"""A setting chosen from the records of a search: the best mean over seeds of a grid's points."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from neo.results.metrics import metric_info
from neo.results.records import RunRecord
from neo.results.row_spec import RowSpec
from neo.results.summary import ABSENT, lookup, number_of, spell
from neo.results.table_spec import ChooseSpec

UNFINISHED = ("interrupted",)  # no outcome: such a run is to be run again

Runs = dict[int, RunRecord]  # of a grid point, by seed
Points = dict[tuple[Any, Any], Runs]


@dataclass(frozen=True)
class Choice:
    """What was chosen for one value of `by`.

    Attributes:
        value: Of `by`.
        setting: The value of `key` whose mean is best.
        mean: Of the metric over the seeds at that setting, in its recorded unit.
        edge: "lowest" or "highest" where the setting ends its grid of numbers; else empty.
        spoilt: Why other settings counted as the worst: setting, seed and status of their runs.
    """

    value: Any
    setting: Any
    mean: float
    edge: str
    spoilt: list[str]


def choose(spec: ChooseSpec, rows: Sequence[RowSpec], runs: Iterable[RunRecord]) -> list[Choice]:
    """Return the choice for every value of `spec.by` that rows or runs have, in their order.

    Every value must have the same grid of settings, and every point of it the same seeds. A point
    with a run that failed, diverged, ran out of memory, was given up or lacks the metric counts as
    the worst, whatever seeds it lacks.

    Args:
        spec: What to choose, and by what.
        rows: Of the table; what their `where` says of `by` and `key` must have been run.
        runs: Of the table, failed ones too.

    Raises:
        ValueError: There are no runs, points or seeds are missing, a run lacks `by` or `key`, two
            runs are one point's same seed, or a value has no point that finished.
    """
    points = _points(spec, runs)
    if not points:
        raise ValueError(f"choose: there are no runs to choose {spec.key} from")
    values, grid = _axes(spec, rows, points)
    _refuse_gaps(spec, points, values, grid)
    return [_best(spec, value, {key: points[value, key] for key in grid}) for value in values]


def overrides(spec: ChooseSpec, choices: Iterable[Choice]) -> str:
    """Return one line of command-line overrides per choice, such as `lora=dora optim.lr=0.003`."""
    return "".join(
        f"{spec.by}={spell(choice.value)} {spec.key}={spell(choice.setting)}\n"
        for choice in choices
    )


def notes(spec: ChooseSpec, choices: Iterable[Choice]) -> list[str]:
    """Return Markdown lines: what was chosen, where it ends its grid, and which runs failed."""
    info = metric_info(spec.metric)
    lines = [f"Chosen: the {spec.key} with the best mean of {spec.metric} over the seeds.", ""]
    for choice in choices:
        mean = f"{choice.mean * info.scale:,.{info.decimals}f} {info.printed_unit}".strip()
        # Not "-", with which the list under it would be read as a part of this one.
        text = f"* {spec.by}={spell(choice.value)}: {spec.key}={spell(choice.setting)} ({mean})"
        if choice.edge:
            text += f"; at the edge of its grid, the {choice.edge} value"
        if choice.spoilt:
            text += f"; counted as the worst: {'; '.join(choice.spoilt)}"
        lines.append(text)
    return lines


def _points(spec: ChooseSpec, runs: Iterable[RunRecord]) -> Points:
    """Return the finished and failed runs of every point of the grid."""
    points: Points = {}
    for run in runs:
        if run.status in UNFINISHED:
            continue
        place = lookup(run, spec.by), lookup(run, spec.key)
        for name, value in zip((spec.by, spec.key), place, strict=True):
            if value is ABSENT or isinstance(value, dict | list):
                raise ValueError(
                    f"choose: run {run.run_id} has no choice and no plain config value {name!r}"
                )
        same = points.setdefault(place, {})
        if run.seed in same:
            raise ValueError(
                f"choose: runs {same[run.seed].run_id} and {run.run_id} are both seed {run.seed} "
                f"of {_spelt(spec, *place)}"
            )
        same[run.seed] = run
    return points


def _axes(spec: ChooseSpec, rows: Sequence[RowSpec], points: Points) -> tuple[list[Any], list[Any]]:
    """Return the values of `by` as they come, and the settings, numbers in ascending order."""
    values = [value for row in rows for value in row.where.get(spec.by, [])]
    grid = [key for row in rows for key in row.where.get(spec.key, [])]
    values = list(dict.fromkeys([*values, *(value for value, _ in points)]))
    grid = list(dict.fromkeys([*grid, *(key for _, key in points)]))
    return values, sorted(grid) if _are_numbers(grid) else grid


def _refuse_gaps(spec: ChooseSpec, points: Points, values: list[Any], grid: list[Any]) -> None:
    """Raise ValueError, naming every gap, unless all points are there with the same seeds."""
    seeds = sorted({seed for same in points.values() for seed in same})
    gaps = []
    for value in values:
        for key in grid:
            runs = points.get((value, key), {})
            missing = [seed for seed in seeds if seed not in runs]
            if missing and all(run.status == "ok" for run in runs.values()):
                gaps.append(f"{_spelt(spec, value, key)} seed={','.join(map(str, missing))}")
    if gaps:
        raise ValueError(f"choose: {len(gaps)} points lack runs:\n  " + "\n  ".join(gaps))


def _best(spec: ChooseSpec, value: Any, points: dict[Any, Runs]) -> Choice:
    means, spoilt = {}, []
    for key, same in points.items():
        numbers = []
        for seed, run in sorted(same.items()):
            found = number_of(run, spec.metric) if run.status == "ok" else None
            if found is None:
                why = run.status if run.status != "ok" else f"no {spec.metric}"
                spoilt.append(f"{spec.key}={spell(key)}, seed {seed} ({why})")
            else:
                numbers.append(found)
        if len(numbers) == len(same):
            means[key] = math.fsum(numbers) / len(numbers)
    if not means:
        raise ValueError(
            f"choose: {spec.by}={spell(value)} has no {spec.key} whose runs all finished with "
            f"{spec.metric}: {'; '.join(spoilt)}"
        )
    pick = max if metric_info(spec.metric).better == "higher" else min
    setting = pick(means, key=lambda key: means[key])
    edge, grid = "", list(points)
    if _are_numbers(grid) and len(grid) > 1 and setting in (grid[0], grid[-1]):
        edge = "lowest" if setting == grid[0] else "highest"
    return Choice(value, setting, means[setting], edge, spoilt)


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _spelt(spec: ChooseSpec, value: Any, key: Any) -> str:
    return f"{spec.by}={spell(value)} {spec.key}={spell(key)}"
