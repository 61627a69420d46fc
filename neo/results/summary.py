"""The runs behind one row of a table, and what their numbers come to over the seeds."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neo.results.metrics import FIELDS, quantity
from neo.results.records import RunRecord
from neo.results.row_spec import RowSpec

ABSENT = object()


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation and ends of `n` numbers; None where there are too few."""

    mean: float | None
    std: float | None
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TableRow:
    """One row and the runs behind it.

    Attributes:
        runs: Those that finished, a seed each.
        failed: The others, whatever stopped them.
    """

    spec: RowSpec
    runs: list[RunRecord]
    failed: list[RunRecord] = field(default_factory=list)


def number_of(run: RunRecord, key: str) -> float | None:
    """Return the number `key` of the run, a metric or a field, in its recorded unit."""
    _, is_field = quantity(key)
    found = getattr(run, key) if is_field else run.metrics.get(key)
    return None if found is None else float(found)


def numbers_of(run: RunRecord) -> dict[str, float | int]:
    """Return every number of the run by its name: the metrics, and the fields that are known."""
    fields = {name: getattr(run, name) for name in FIELDS}
    return run.metrics | {name: value for name, value in fields.items() if value is not None}


def by_seed(runs: Sequence[RunRecord], key: str) -> dict[int, float]:
    """Return seed to number, in recorded units, for the runs that have the number `key`."""
    found = {run.seed: number_of(run, key) for run in runs}
    return {seed: number for seed, number in found.items() if number is not None}


def summarize(runs: Sequence[RunRecord], key: str) -> Summary:
    """Return mean, spread and ends, in recorded units, of the number `key` over the runs."""
    numbers = [number for run in runs if (number := number_of(run, key)) is not None]
    return Summary(
        mean=statistics.fmean(numbers) if numbers else None,
        std=statistics.stdev(numbers) if len(numbers) > 1 else None,
        n=len(numbers),
        low=min(numbers, default=None),
        high=max(numbers, default=None),
    )


def lookup(run: RunRecord, key: str) -> Any:
    """Return the choice or the value at a dotted config path, or `ABSENT`."""
    if key in run.choices:
        return run.choices[key]
    value: Any = run.config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return value


def leaves(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of everything in the config that is no mapping."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def spell(value: Any) -> str:
    """Return a config value as it would be typed: texts bare, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def spelt_values(runs: Sequence[RunRecord], key: str) -> str:
    """Return the distinct config values at `key` in the order of the runs; empty without any."""
    found = [value for run in runs if (value := lookup(run, key)) is not ABSENT]
    return ", ".join(dict.fromkeys(spell(value) for value in found))
