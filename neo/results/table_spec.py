"""What a table is to show: the strict reading of an experiment's `table.yaml`."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from neo.results.metrics import field_info, metric_info, quantity

Scalar = str | int | float | bool | None
PANEL_KINDS = ("bars", "curves", "scatter")


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """One row of a table: the runs that match every entry of `where`.

    Attributes:
        label: As printed.
        where: Config group or dotted config path to the values it may have.
        group: Rows are compared with rows of the same group only.
        reference: Shown but not compared, such as the teacher; without a group it goes with all.
        paper: Column to the published number, in the column's printed unit.
    """

    label: str
    where: dict[str, list[Scalar]]
    group: str = ""
    reference: bool = False
    paper: dict[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """One column of a table; a printed number is the recorded one times `scale`."""

    key: str
    is_field: bool
    label: str
    unit: str
    decimals: int
    better: str | None
    scale: float

    @property
    def header(self) -> str:
        """The label, the unit, and an arrow towards the good end."""
        unit = f" ({self.unit})" if self.unit else ""
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[self.better]
        return f"{self.label}{unit}{arrow}"


@dataclass(frozen=True, kw_only=True)
class PanelSpec:
    """One panel of the figure.

    Attributes:
        kind: "bars" (x: metrics, `/*` stands for all kinds of one), "curves" (x: the step, y: a
            logged metric) or "scatter" (x and y: a metric or record field each).
        x: One or more names.
        y: Name of what is drawn upwards; bars have none.
        title: Above the panel; made from the metrics where empty.
    """

    kind: str
    x: list[str]
    y: str = ""
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """The whole of a `table.yaml`."""

    title: str
    rows: list[RowSpec]
    columns: list[ColumnSpec]
    command: str = ""
    note: str = ""
    group_label: str = ""
    figures: list[PanelSpec] = field(default_factory=list)


def read_table_spec(path: Path | str) -> TableSpec:
    """Return the table described by the YAML file at `path`.

    Raises:
        ValueError: The file is no YAML, has an unknown or repeated key, lacks one, or holds a
            value of the wrong type; the message names file and key.
    """
    try:
        return _table(OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (ValueError, YAMLError, OSError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {error}") from error


def _table(node: Any) -> TableSpec:
    entries = _Entries(node, "")
    rows = [_row(row, f"rows[{i}]") for i, row in enumerate(entries.take("rows", list))]
    columns = [_column(c, f"columns[{i}]") for i, c in enumerate(entries.take("columns", list))]
    figures = [
        _panel(p, f"figures[{i}]") for i, p in enumerate(entries.take("figures", list, default=[]))
    ]
    spec = TableSpec(
        title=entries.take("title", str),
        rows=rows,
        columns=columns,
        command=entries.take("command", str, default=""),
        note=entries.take("note", str, default=""),
        group_label=entries.take("group_label", str, default=""),
        figures=figures,
    )
    entries.finish()
    for name, values in (
        ("rows", [f"{row.group} / {row.label}" if row.group else row.label for row in rows]),
        ("columns", [column.key for column in columns]),
    ):
        if not values:
            raise ValueError(f"{name}: there is none")
        if repeated := {value for value in values if values.count(value) > 1}:
            raise ValueError(f"{name}: {', '.join(sorted(repeated))} stands there more than once")
    keys = [column.key for column in columns]
    for i, row in enumerate(rows):
        for key in row.paper:
            if key not in keys:
                raise ValueError(f"rows[{i}].paper: {key!r} is no column; legal: {', '.join(keys)}")
    return spec


def _row(node: Any, place: str) -> RowSpec:
    entries = _Entries(node, place)
    where = entries.take("where", dict)
    if not where:
        raise ValueError(f"{place}.where: names nothing, so every run would match")
    paper = entries.take("paper", dict, default={})
    for key, value in paper.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{place}.paper.{key}: {value!r} is not a number")
    row = RowSpec(
        label=entries.take("label", str),
        where={
            str(key): value if isinstance(value, list) else [value] for key, value in where.items()
        },
        group=entries.take("group", str, default=""),
        reference=entries.take("reference", bool, default=False),
        paper=paper,
    )
    entries.finish()
    return row


def _column(node: Any, place: str) -> ColumnSpec:
    entries = _Entries(node, place)
    if isinstance(node, dict) and "metric" in node and "field" in node:
        raise ValueError(f"{place}: has both 'metric' and 'field'; a column shows one")
    is_field = isinstance(node, dict) and "field" in node
    key = entries.take("field" if is_field else "metric", str)
    try:
        info = field_info(key) if is_field else metric_info(key)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if isinstance(node, dict) and "scale" in node and "unit" not in node:
        raise ValueError(
            f"{place}.scale: a scaled number has another unit, so 'unit' must be given"
        )
    column = ColumnSpec(
        key=key,
        is_field=is_field,
        label=entries.take("label", str, default=key),
        unit=entries.take("unit", str, default=info.printed_unit),
        decimals=entries.take("decimals", int, default=info.decimals),
        better=entries.take("better", str | None, default=info.better),
        scale=float(entries.take("scale", int | float, default=info.scale)),
    )
    entries.finish()
    if column.better not in ("higher", "lower", None):
        raise ValueError(f"{place}.better: {column.better!r}, legal: higher, lower, null")
    if column.decimals < 0:
        raise ValueError(f"{place}.decimals: {column.decimals} is negative")
    return column


def _panel(node: Any, place: str) -> PanelSpec:
    entries = _Entries(node, place)
    x = entries.take("x", str | list, default="step")
    panel = PanelSpec(
        kind=entries.take("kind", str),
        x=[x] if isinstance(x, str) else x,
        y=entries.take("y", str, default=""),
        title=entries.take("title", str, default=""),
    )
    entries.finish()
    if panel.kind not in PANEL_KINDS:
        raise ValueError(f"{place}.kind: {panel.kind!r}, legal: {', '.join(PANEL_KINDS)}")
    if panel.kind == "bars" and panel.y:
        raise ValueError(f"{place}.y: bars have none; the metrics stand in x")
    if panel.kind != "bars" and (not panel.y or len(panel.x) != 1):
        raise ValueError(f"{place}: {panel.kind} need one x and one y")
    if panel.kind == "curves" and panel.x != ["step"]:
        raise ValueError(f"{place}.x: {panel.x[0]!r}, legal for curves: step")
    names = {"bars": panel.x, "curves": [panel.y], "scatter": [*panel.x, panel.y]}[panel.kind]
    try:
        units = {quantity(str(name).removesuffix("/*"))[0].unit for name in names}
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if panel.kind == "bars" and len(units) != 1:
        raise ValueError(f"{place}.x: bars share one axis, but these have {len(units)} units")
    return panel


class _Entries:
    """The keys of one YAML mapping, each to be taken once."""

    def __init__(self, node: Any, place: str) -> None:
        if not isinstance(node, Mapping):
            raise ValueError(f"{place or 'the file'}: {node!r} is not a mapping of keys to values")
        self.left = dict(node)
        self.place = f"{place}." if place else ""
        self.taken: list[str] = []

    def take(self, key: str, kind: Any, **default: Any) -> Any:
        """Return the value of `key`, or the default where one is given."""
        self.taken.append(key)
        if key not in self.left:
            if "default" in default:
                return default["default"]
            raise ValueError(f"key '{self.place}{key}' is missing")
        value = self.left.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"key '{self.place}{key}' is {value!r}, not of type {_name(kind)}")
        return value

    def finish(self) -> None:
        """Raise ValueError where a key was not taken."""
        for key in self.left:
            near = difflib.get_close_matches(str(key), self.taken, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"legal: {', '.join(self.taken)}"
            raise ValueError(f"key '{self.place}{key}' is unknown; {hint}")


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))
