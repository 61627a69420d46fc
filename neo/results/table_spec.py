"""What a table is to show: the strict reading of an experiment's `table.yaml`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from neo.results.entries import Entries
from neo.results.metrics import field_info, metric_info
from neo.results.panel_spec import PanelSpec, read_panel
from neo.results.row_spec import RowSpec, read_row

SOURCES = ("metric", "field", "config")
INTERVALS = ("t", "bootstrap")


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """One column of a table; a printed number is the recorded one times `scale`.

    Attributes:
        key: Name of a metric, of a record's field, or a dotted config path.
        source: Which of the three, one of `SOURCES`; a config value is printed as it is.
        range: Whether a cell shows its lowest and highest seed, too.
        compare: Whether the rows are compared with the baseline in this column.
    """

    key: str
    source: str
    label: str
    unit: str
    decimals: int
    better: str | None
    scale: float
    range: bool = False
    compare: bool = False

    @property
    def header(self) -> str:
        """The label, the unit, and an arrow towards the good end."""
        unit = f" ({self.unit})" if self.unit else ""
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[self.better]
        return f"{self.label}{unit}{arrow}"


@dataclass(frozen=True, kw_only=True)
class ChooseSpec:
    """What setting is to be chosen from the records.

    Attributes:
        by: Config group or dotted config path; one setting is chosen for each of its values.
        key: Config group or dotted config path of the setting.
        metric: What the mean over seeds of is to be best.
    """

    by: str
    key: str
    metric: str


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """The whole of a `table.yaml`.

    Attributes:
        baseline: Label of the row, one in each group, that the others are compared with; or empty.
        interval: Of the differences to the baseline, one of `INTERVALS`.
        choose: What is chosen from the runs of the table.
        included: Markdown to stand under the table.
        transpose: Whether the columns stand as lines and the rows as columns; the comparison with
            a baseline stays as it is.
    """

    title: str
    rows: list[RowSpec]
    columns: list[ColumnSpec]
    command: str = ""
    note: str = ""
    group_label: str = ""
    figures: list[PanelSpec] = field(default_factory=list)
    baseline: str = ""
    interval: str = "t"
    choose: ChooseSpec | None = None
    included: str = ""
    transpose: bool = False


def read_table_spec(path: Path | str) -> TableSpec:
    """Return the table described by the YAML file at `path`.

    Raises:
        ValueError: The file is no YAML, has an unknown or repeated key, lacks one, holds a value
            of the wrong type, or includes a file that is not there; the message names file and key.
    """
    try:
        return _table(OmegaConf.to_container(OmegaConf.load(path), resolve=True), Path(path).parent)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (ValueError, YAMLError, OSError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {error}") from error


def _table(node: Any, folder: Path) -> TableSpec:
    entries = Entries(node, "")
    rows = [read_row(row, f"rows[{i}]") for i, row in enumerate(entries.take("rows", list))]
    columns = [_column(c, f"columns[{i}]") for i, c in enumerate(entries.take("columns", list))]
    figures = [
        read_panel(p, f"figures[{i}]")
        for i, p in enumerate(entries.take("figures", list, default=[]))
    ]
    choose = entries.take("choose", dict, default=None)
    spec = TableSpec(
        title=entries.take("title", str),
        rows=rows,
        columns=columns,
        command=entries.take("command", str, default=""),
        note=entries.take("note", str, default=""),
        group_label=entries.take("group_label", str, default=""),
        figures=figures,
        baseline=entries.take("baseline", str, default=""),
        interval=entries.take("interval", str, default="t"),
        choose=None if choose is None else _choose(choose),
        included=_included(entries.take("include", str, default=""), folder),
        transpose=entries.take("transpose", bool, default=False),
    )
    entries.finish()
    for name, values in (
        ("rows", [row.name for row in rows]),
        ("columns", [column.key for column in columns]),
    ):
        if not values:
            raise ValueError(f"{name}: there is none")
        if repeated := {value for value in values if values.count(value) > 1}:
            raise ValueError(f"{name}: {', '.join(sorted(repeated))} stands there more than once")
    keys = [column.key for column in columns]
    for i, row in enumerate(rows):
        for entry, numbers in (("paper", row.paper), ("quoted", row.quoted)):
            for key in numbers:
                if key not in keys:
                    legal = ", ".join(keys)
                    raise ValueError(f"rows[{i}].{entry}: {key!r} is no column; legal: {legal}")
    if spec.transpose and any(row.group for row in rows):
        raise ValueError("transpose: a table of groups is not turned; leave out one of the two")
    _check_baseline(spec)
    return spec


def _check_baseline(spec: TableSpec) -> None:
    """Raise ValueError unless the baseline is one row of every group, and something is compared."""
    compared = [column.key for column in spec.columns if column.compare]
    if spec.interval not in INTERVALS:
        raise ValueError(f"interval: {spec.interval!r}, legal: {', '.join(INTERVALS)}")
    if not spec.baseline:
        if spec.interval != "t":
            raise ValueError("interval: is that of differences, but there is no 'baseline'")
        if compared:
            raise ValueError(f"columns: {compared[0]} has 'compare', but there is no 'baseline'")
        return
    if not compared:
        raise ValueError("baseline: no column has 'compare: true', so nothing is compared with it")
    competing = [row for row in spec.rows if not row.reference]
    for group in dict.fromkeys(row.group for row in competing):
        labels = [row.label for row in competing if row.group == group]
        if spec.baseline not in labels:
            place = f" of group {group!r}" if group else ""
            raise ValueError(
                f"baseline: {spec.baseline!r} is no competing row{place}; "
                f"legal: {', '.join(labels)}"
            )


def _choose(node: Any) -> ChooseSpec:
    entries = Entries(node, "choose")
    spec = ChooseSpec(
        by=entries.take("by", str),
        key=entries.take("key", str),
        metric=entries.take("metric", str),
    )
    entries.finish()
    if spec.by == spec.key:
        raise ValueError(f"choose.key: {spec.key!r} is what 'by' names; nothing is left to choose")
    try:
        info = metric_info(spec.metric)
    except ValueError as error:
        raise ValueError(f"choose.metric: {error}") from error
    if info.better is None:
        raise ValueError(f"choose.metric: {spec.metric} has no better end to choose by")
    return spec


def _included(name: str, folder: Path) -> str:
    """Return the text of the file called `name`, seen from the folder of the `table.yaml`."""
    if not name:
        return ""
    if not (folder / name).is_file():
        raise ValueError(f"include: {name!r} is not there; a Markdown file's path from {folder}")
    return (folder / name).read_text(encoding="utf-8")


def _column(node: Any, place: str) -> ColumnSpec:
    entries = Entries(node, place)
    given = [source for source in SOURCES if isinstance(node, dict) and source in node]
    if len(given) > 1:
        both = " and ".join(repr(source) for source in given)
        raise ValueError(f"{place}: has both {both}; a column shows one")
    source = given[0] if given else "metric"
    key = entries.take(source, str)
    if source == "config":  # a setting: no unit, no mean, nothing to compare
        column = ColumnSpec(
            key=key,
            source=source,
            label=entries.take("label", str, default=key),
            unit="",
            decimals=0,
            better=None,
            scale=1.0,
        )
        entries.finish()
        return column
    try:
        info = field_info(key) if source == "field" else metric_info(key)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if isinstance(node, dict) and "scale" in node and "unit" not in node:
        raise ValueError(
            f"{place}.scale: a scaled number has another unit, so 'unit' must be given"
        )
    column = ColumnSpec(
        key=key,
        source=source,
        label=entries.take("label", str, default=key),
        unit=entries.take("unit", str, default=info.printed_unit),
        decimals=entries.take("decimals", int, default=info.decimals),
        better=entries.take("better", str | None, default=info.better),
        scale=float(entries.take("scale", int | float, default=info.scale)),
        range=entries.take("range", bool, default=False),
        compare=entries.take("compare", bool, default=False),
    )
    entries.finish()
    if column.better not in ("higher", "lower", None):
        raise ValueError(f"{place}.better: {column.better!r}, legal: higher, lower, null")
    if column.decimals < 0:
        raise ValueError(f"{place}.decimals: {column.decimals} is negative")
    return column
