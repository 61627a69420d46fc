"""A `table.yaml` to start from, for an experiment that has records and none yet."""

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from omegaconf import OmegaConf

from neo.results.evaluations import is_untrained
from neo.results.metrics import STDERR
from neo.results.records import RunRecord
from neo.results.summary import ABSENT, leaves, lookup, spell
from neo.results.tables import matches

# The groups that a row is named by, the most telling first; those of a machine are not among them.
CHOICES = (
    "method",
    "lora",
    "loss",
    "student",
    "teacher",
    "data",
    "optim",
    "pair",
    "scale",
    "experiment",
)
METRICS = ("val/kd", "val/ce")
COSTS = ("num_trainable_parameters", "perf/peak_mem_gib", "seconds")

HEADER = """\
# Started by `python -m neo.report {name}` from the records; never written again, so edit it:
# labels, order, columns, figures. With `baseline: LABEL`, and `compare: true` in a column, every
# row is compared with that one, seed by seed; `interval: bootstrap` changes the interval.
"""


def draft(name: str, records: Sequence[RunRecord], where_it_ran: Sequence[str]) -> str:
    """Return the text of a `table.yaml` with one row for each setting of the runs.

    What tells rows apart is what differs between the runs besides the seed: first the choices, then
    what was typed, then any other key of the config; a key that says nothing more is left out. Keys
    of `where_it_ran` make no rows: two runs that differ in nothing else are the same run.

    Args:
        name: Of the experiment.
        records: At least one.
        where_it_ran: Dotted config paths, each with all below it, that a run's identity ignores.

    Raises:
        ValueError: No keys can name the runs of one row and no others.
    """
    ordered = sorted(records, key=lambda run: (run.seed, run.run_id))
    keys = _telling(ordered, where_it_ran) or _any_key(ordered)
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in ordered:
        groups.setdefault(_place(run, keys), []).append(run)
    rows: list[dict[str, Any]] = []
    for runs in sorted(groups.values(), key=lambda runs: _order(runs[0], keys)):
        where = {key: _entry(v) for key in keys if (v := _value(runs[0], key)) is not ABSENT}
        own = {run.run_id for run in runs}
        typed = {key: v if isinstance(v, list) else [v] for key, v in where.items()}
        for run in ordered:
            if matches(run, typed) != (run.run_id in own):
                raise ValueError(
                    f"no table.yaml can be started: runs {runs[0].run_id} and {run.run_id} cannot "
                    f"be told apart by {', '.join(keys)}, which one of them lacks; write it by hand"
                )
        reference = {"reference": True} if is_untrained(runs[0]) else {}
        rows.append({"label": _label(runs[0], keys), "where": where, **reference})
    if len({row["label"] for row in rows}) < len(rows):
        for row in rows:
            row["label"] = ", ".join(f"{key}={spell(v)}" for key, v in row["where"].items())
    node = {
        "title": f"{name}: by {', '.join(keys)}",
        "rows": rows,
        "columns": _columns(ordered),
        "figures": _figures(ordered, max(len(runs) for runs in groups.values())),
    }
    return HEADER.format(name=name) + OmegaConf.to_yaml(OmegaConf.create(node))


def _telling(records: Sequence[RunRecord], where_it_ran: Sequence[str]) -> list[str]:
    """Return the keys that tell the rows apart, none of them without need."""
    found: list[str] = []
    parts = 1
    for key in _candidates(records, where_it_ran):
        new = len({_place(run, [*found, key]) for run in records})
        if new > parts:
            found.append(key)
            parts = new
    for key in reversed(found):
        fewer = [other for other in found if other != key]
        places = {_place(run, fewer) for run in records}
        if len(places) == parts and all(_apart(*pair) for pair in combinations(places, 2)):
            found = fewer
    return found


def _apart(left: tuple[str, ...], right: tuple[str, ...]) -> bool:
    """Return whether a `where` can tell the two apart: both have a value at a key, another one."""
    return any(a and b and a != b for a, b in zip(left, right, strict=True))


def _candidates(records: Sequence[RunRecord], where_it_ran: Sequence[str]) -> list[str]:
    """Return the keys that differ between the runs, the most telling first."""
    typed = [text.lstrip("+").partition("=")[0] for run in records for text in run.overrides]
    config = {key for run in records for key in _legal(run.config)}
    ran = {key for key in config if any(f"{key}.".startswith(f"{path}.") for path in where_it_ran)}
    keys = [*CHOICES, *(key for key in typed if key in config), *sorted(config)]
    kept = [key for key in dict.fromkeys(keys) if key not in ran]
    return [key for key in kept if _differs(records, key)]


def _differs(records: Sequence[RunRecord], key: str) -> bool:
    """Return whether runs have different values at `key`; a run that has none does not count."""
    found = [(_value(run, key), run.seed) for run in records]
    present = [(value, seed) for value, seed in found if value is not ABSENT]
    if all(value == seed for value, seed in present):  # the seed, or a copy of it
        return False
    return len({json.dumps(value) for value, _ in present}) > 1


def _legal(config: dict[str, Any]) -> Iterator[str]:
    """Yield the dotted path of every value that a `where` can hold."""
    for key, value in leaves(config):
        if not isinstance(value, list) or not any(isinstance(v, dict | list) for v in value):
            yield key


def _any_key(records: Sequence[RunRecord]) -> list[str]:
    """Return a key for the one row of runs that differ in nothing but the seed."""
    keys = [*CHOICES, *_legal(records[0].config)]
    shared = [key for key in keys if all(_value(run, key) is not ABSENT for run in records)]
    if not shared:
        raise ValueError("no table.yaml can be started: the runs have no choice and no config")
    return shared[:1]


def _value(run: RunRecord, key: str) -> Any:
    """Return the choice or the config value at `key`; a whole group of the config is none."""
    value = lookup(run, key)
    return ABSENT if isinstance(value, dict) else value


def _place(run: RunRecord, keys: Sequence[str]) -> tuple[str, ...]:
    values = [_value(run, key) for key in keys]
    return tuple("" if value is ABSENT else json.dumps(value) for value in values)


def _order(run: RunRecord, keys: Sequence[str]) -> list[tuple[bool, float, str]]:
    """Return what to sort a row by: numbers by size, anything else by its text."""
    found = []
    for key in keys:
        value = _value(run, key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        text = "" if value is ABSENT or is_number else spell(value)
        found.append((is_number, float(value) if is_number else 0.0, text))
    return found


def _label(run: RunRecord, keys: Sequence[str]) -> str:
    """Return a choice by itself and any other value behind the last part of its key."""
    lasts = [key.rpartition(".")[2] for key in keys]
    parts = []
    for key, last in zip(keys, lasts, strict=True):
        value = _value(run, key)
        if key in run.choices:
            parts.append(spell(value))
        elif value is not ABSENT:
            parts.append(f"{last if lasts.count(last) == 1 else key} {spell(value)}")
    return ", ".join(parts)


def _entry(value: Any) -> Any:
    """Return the value as a `where` holds it: a list of values stands in a list."""
    return [value] if isinstance(value, list) else value


def _columns(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """Return the numbers that any of the runs has, quality before costs."""
    names = {name for run in records for name in run.metrics}
    answers = sorted(n for n in names if n.startswith("eval/") and n.endswith("/exact_match"))
    evaluated = {task for run in records for entry in run.evaluations for task in entry["tasks"]}
    answers = [name for name in answers if name.split("/")[1] not in evaluated]
    found = []
    for key in (*METRICS, *answers, *_evaluations(records), *COSTS):
        if key in names:
            found.append({"metric": key})
        elif key in COSTS and any(getattr(run, key, None) is not None for run in records):
            found.append({"field": key})
    return found or [{"metric": METRICS[0]}]  # all runs failed: the table says so


def _evaluations(records: Sequence[RunRecord]) -> list[str]:
    """Return the metrics of what was asked for by name, not of the tasks in a group."""
    asked = {entry["name"]: None for run in records for entry in run.evaluations}
    names = {name for run in records for name in run.metrics}
    prefixes = tuple(f"eval/{name}/" for name in asked)
    found = {name for name in names if prefixes and name.startswith(prefixes)}
    return sorted(name for name in found if not name.split("/")[2].endswith(STDERR))


def _figures(records: Sequence[RunRecord], most_runs: int) -> list[dict[str, str]]:
    """Return the learning curves of the quality, and its seeds where there are several."""
    main = next((key for key in METRICS if any(key in run.metrics for run in records)), None)
    if main is None:
        return []
    figures = [{"kind": "curves", "y": main}]
    return [*figures, {"kind": "seeds", "x": main}] if most_runs > 1 else figures
