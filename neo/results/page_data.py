"""What report.html carries as data: every run's whole record, its curves, and the columns."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo.results.evaluations import is_untrained
from neo.results.metrics import FIELDS, METRICS, Metric, metric_info
from neo.results.page_curves import points_per_curve, read_curves, short, thin
from neo.results.records import RunRecord
from neo.results.summary import ABSENT, lookup
from neo.results.tables import Table

# Fields of the record that stand in the table of runs, where the table has them not already.
FIELD_LABELS = {
    "num_trainable_parameters": "trained parameters",
    "num_tokens": "tokens",
    "seconds": "time",
    "peak_memory_gib": "peak memory",
}
_OWN = ("run_id", "experiment_name", "status", "seed", "started_at", "error", *FIELDS)


@dataclass(frozen=True)
class Setting:
    """A config group or config path whose value is not the same in all runs."""

    label: str
    path: tuple[str, ...]


class Pool:
    """Values that are stored once, however many runs have them."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        """Return the index of the value in `values`, which it enters if it is new."""
        spelt = json.dumps(value)  # the order of keys is kept, and True is not 1
        if spelt not in self._places:
            self._places[spelt] = len(self.values)
            self.values.append(value)
        return self._places[spelt]


def page_data(
    table: Table, records: Sequence[RunRecord], curves: Mapping[str, Path]
) -> dict[str, Any]:
    """Return what the page's script reads, in JSON types only.

    Args:
        table: Gives the columns of numbers, and which row a run belongs to.
        records: All runs, in any order: they come out in the order of the table's rows.
        curves: Run id to a copy of the run's `metrics.csv`, for the runs that have one.

    Raises:
        ValueError: A log has a column that is no metric, or a cell that is no number.
    """
    rows = _rows_of(table)
    order = {run_id: i for i, run_id in enumerate(rows)}
    ordered = sorted(records, key=lambda r: (order.get(r.run_id, len(order)), r.seed, r.run_id))
    trained = [run for run in ordered if not is_untrained(run)]
    logs = [read_curves(curves[r.run_id]) if r.run_id in curves else ({}, {}) for r in ordered]
    logged = {name for found, _ in logs for name, curve in found.items() if len(curve) > 1}
    recorded = _in_order({name for run in ordered for name in run.metrics})
    measured = map(metric_info, _in_order({*recorded, *logged}))
    limit = points_per_curve(sum(len(found) for found, _ in logs))
    pool, steps = Pool(), Pool()
    return {
        "columns": _columns(table, ordered),
        "metrics": {info.name: _printed(info) for info in (*FIELDS.values(), *measured)},
        "metric_names": recorded,
        "curve_names": sorted(logged, key=_curve_rank),
        "differing": [".".join(path) for path, _ in differing_paths(trained)],
        "points_per_curve": limit,
        "runs": [
            {
                "own": {key: v for key in _OWN if (v := getattr(run, key)) is not None},
                "shared": {
                    key: pool.place(value)
                    for key, value in run.known().items()
                    if key not in (*_OWN, "config", "metrics")
                },
                "config": {key: pool.place(value) for key, value in run.config.items()},
                "metrics": [run.metrics.get(name) for name in recorded],
                "rows": rows.get(run.run_id, []),
                "repeat": _repeat(run),
                "command": shlex.join(run.argv),
                "unusable": unusable,
            }
            for run, (_, unusable) in zip(ordered, logs, strict=True)
        ],
        "curves": [
            {
                name: [steps.place([short(x) for x, _ in kept]), [short(y) for _, y in kept]]
                for name in _in_order(set(found))
                if name in logged
                for kept in [thin(found[name], limit)]
            }
            for found, _ in logs
        ],
        "pool": pool.values,
        "steps": steps.values,
    }  # fmt: skip


def _repeat(run: RunRecord) -> str:
    """Return the command that makes the record again."""
    if is_untrained(run):
        return shlex.join(run.argv)
    return shlex.join(["python", "-m", "neo.train", *run.overrides])


def settings(records: Sequence[RunRecord], named: Iterable[str] = ()) -> list[Setting]:
    """Return what differs between the runs: choices first, then config paths.

    A path that one choice settles (`lora.use_dora` where `lora` is chosen) says no more than the
    choice does and is left out, unless it was typed for a run or stands in `named`. So is the seed,
    which has a column of its own.
    """
    groups = dict.fromkeys(group for run in records for group in run.choices)
    chosen = [group for group in groups if len({run.choices.get(group) for run in records}) > 1]
    typed = {text.partition("=")[0].lstrip("+") for run in records for text in run.overrides}
    found = [Setting(group, ("choices", group)) for group in chosen]
    for path, spelt in differing_paths(records):
        name = ".".join(path)
        if path == ("seed",):
            continue
        if name in typed or name in named or not any(_settles(g, spelt, records) for g in chosen):
            found.append(Setting(name, ("config", *path)))
    return found


def _settles(group: str, spelt: Sequence[str | None], records: Sequence[RunRecord]) -> bool:
    """Whether runs with the same choice of the group have the same value."""
    pairs = {(run.choices.get(group), text) for run, text in zip(records, spelt, strict=True)}
    return len(pairs) == len({choice for choice, _ in pairs})


def differing_paths(
    records: Sequence[RunRecord],
) -> list[tuple[tuple[str, ...], list[str | None]]]:
    """Return every config path whose value differs, with each run's value as JSON, or None."""
    flat = [dict(_leaves(run.config)) for run in records]
    paths = dict.fromkeys(path for leaves in flat for path in leaves)
    spelt = [(path, [leaves.get(path) for leaves in flat]) for path in paths]
    return [(path, texts) for path, texts in spelt if len(set(texts)) > 1]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield path and JSON of every value that is no mapping, or an empty one."""
    if isinstance(value, dict) and (value or not path):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield path, json.dumps(value)


def _rows_of(table: Table) -> dict[str, list[str]]:
    """Return run id to the labels of the rows that it stands in, in the order of the rows."""
    found: dict[str, list[str]] = {}
    for row in table.rows:
        name = f"{row.spec.group}, {row.spec.label}" if row.spec.group else row.spec.label
        own = [run for run in row.runs] + [run for label, run in table.failed if label == name]
        for run in sorted(own, key=lambda run: (run.seed, run.run_id)):
            if name not in found.setdefault(run.run_id, []):
                found[run.run_id].append(name)
    return found


def _columns(table: Table, records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the columns of the runs' table: identity, settings, the table's numbers, costs."""
    named = {key for row in table.spec.rows for key in row.where}
    columns = [
        _setting("run", "run", ("run_id",)),
        _setting("status", "status", ("status",)),
        *(_setting("key", setting.label, setting.path) for setting in settings(records, named)),
        _setting("seed", "seed", ("seed",)),
    ]
    paths = [column["path"] for column in columns]
    for column in table.spec.columns:
        if column.source != "config":
            place = [column.key] if column.source == "field" else ["metrics", column.key]
            info = FIELDS[column.key] if column.source == "field" else metric_info(column.key)
            arrow = {"higher": " ↑", "lower": " ↓", None: ""}[column.better]
            columns.append(
                {
                    "role": "number",
                    "label": column.label,
                    "path": place,
                    "setting": False,
                    "unit": f"{column.unit}{arrow}".strip(),
                    "decimals": column.decimals,
                    "scale": column.scale,
                    "description": f"{column.key}: {info.description}",
                }
            )
        elif (path := _path(records, column.key)) is not None and path not in paths:
            columns.append(_setting("key", column.label, path))
    shown = [column["path"] for column in columns]
    if ["metrics", "perf/peak_mem_gib"] in shown:
        shown.append(["peak_memory_gib"])  # the same number
    for name, label in FIELD_LABELS.items():
        if [name] not in shown and any(getattr(run, name) is not None for run in records):
            info = FIELDS[name]
            unit = "" if info.printed_unit == label else info.printed_unit
            columns.append(
                {"role": "number", "label": label, "path": [name], "setting": False}
                | _printed(info)
                | {"unit": unit}
            )
    return columns


def _path(records: Iterable[RunRecord], key: str) -> list[str] | None:
    """Return where the records have the config group or dotted config path `key`."""
    for run in records:
        if key in run.choices:
            return ["choices", key]
        if lookup(run, key) is not ABSENT:
            return ["config", *key.split(".")]
    return None


def _setting(role: str, label: str, path: Sequence[str]) -> dict[str, Any]:
    return {"role": role, "label": label, "path": list(path), "setting": True, "decimals": None}


def _printed(info: Metric) -> dict[str, Any]:
    return {
        "unit": info.printed_unit,
        "decimals": info.decimals,
        "scale": info.scale,
        "description": info.description,
        "field": info.name in FIELDS,
    }


def _in_order(names: set[str]) -> list[str]:
    """Return the metrics in the order of the metrics' table, then the evaluations."""
    known = list(METRICS)
    return sorted(names, key=lambda n: (known.index(n) if n in METRICS else len(known), n))


def _curve_rank(name: str) -> tuple[bool, bool, bool, str]:
    """Return what puts held-out kd first, and the machine's numbers last."""
    return name != "val/kd", not name.startswith("val/"), not name.startswith("train/"), name
