"""What a panel of the figure is to show: the strict reading of one entry of `figures`."""

import re
from dataclasses import dataclass
from typing import Any

from neo.results.entries import Entries
from neo.results.metrics import quantity

ROW_KINDS = ("bars", "curves", "scatter", "seeds", "pareto")
KEY_KINDS = ("sweep", "parallel", "heatmap")
PANEL_KINDS = ROW_KINDS + KEY_KINDS
STEPS = ("step", "tokens")


@dataclass(frozen=True, kw_only=True)
class PanelSpec:
    """One panel of the figure.

    Attributes:
        kind: "bars" (x: metrics, `/*` stands for all kinds of one), "curves" (x: step or tokens,
            y: a logged metric), "scatter" and "pareto" (x and y: a metric or record field each)
            and "seeds" (x: one metric or record field, a dot per seed on a line per row) are drawn
            from the table's rows. "sweep" (x: a key, y: a number), "parallel" (x: keys, y: a
            number) and "heatmap" (x and y: a key each, z: a number) are drawn from its runs, where
            a key is a config group or a dotted config path.
        x: One or more names.
        y: What is drawn upwards; bars and seeds have none.
        z: What a heat map's cells show.
        by: Key of a sweep or of curves: a line for each of its values.
        title: Above the panel; made from the names where empty.
        log: A pareto panel's axes are logarithmic.
        name: The panel is also a file of its own, `figure-NAME.png`; not where empty.
    """

    kind: str
    x: list[str]
    y: str = ""
    z: str = ""
    by: str = ""
    title: str = ""
    name: str = ""
    log: bool = False

    @property
    def over_keys(self) -> bool:
        """Whether the panel is drawn from runs by their config, once, and not from the rows."""
        return self.kind in KEY_KINDS or bool(self.by)

    @property
    def keys(self) -> dict[str, list[str]]:
        """The config keys that the panel needs, by the entry that names them."""
        found = {"by": [self.by] if self.by else []}
        if self.kind in KEY_KINDS:
            found["x"] = self.x
        if self.kind == "heatmap":
            found["y"] = [self.y]
        return found

    @property
    def numbers(self) -> dict[str, list[str]]:
        """The metrics and record fields that the panel shows, by the entry that names them."""
        found = {"x": self.x, "y": [self.y] if self.y else [], "z": [self.z] if self.z else []}
        for entry, keys in self.keys.items():
            if keys and entry in found:
                del found[entry]
        if self.kind == "curves":
            del found["x"]
        return found


def read_panel(node: Any, place: str) -> PanelSpec:
    """Return the panel that the YAML node at `place` describes.

    Raises:
        ValueError: A key is unknown, missing or of another type, or the panel cannot be drawn.
    """
    entries = Entries(node, place)
    x = entries.take("x", str | list, default="step")
    x = [x] if isinstance(x, str) else x
    for i, name in enumerate(x):
        if not isinstance(name, str):
            raise ValueError(f"{place}.x[{i}]: {name!r} is not a text")
    panel = PanelSpec(
        kind=entries.take("kind", str),
        x=x,
        y=entries.take("y", str, default=""),
        z=entries.take("z", str, default=""),
        by=entries.take("by", str, default=""),
        title=entries.take("title", str, default=""),
        name=entries.take("name", str, default=""),
        log=entries.take("log", bool, default=False),
    )
    entries.finish()
    if panel.kind not in PANEL_KINDS:
        raise ValueError(f"{place}.kind: {panel.kind!r}, legal: {', '.join(PANEL_KINDS)}")
    if panel.name and not re.fullmatch(r"[\w-]+", panel.name, re.ASCII):
        raise ValueError(f"{place}.name: {panel.name!r}, legal: letters, digits, _ and -")
    _check_shape(panel, place, x_given=isinstance(node, dict) and "x" in node)
    _check_keys(panel, place)
    _check_numbers(panel, place)
    return panel


def _check_shape(panel: PanelSpec, place: str, *, x_given: bool) -> None:
    """Raise ValueError where the kind of panel lacks an entry or has one too many."""
    kind = panel.kind
    one_x = len(panel.x) == 1
    if kind == "bars" and panel.y:
        raise ValueError(f"{place}.y: bars have none; the metrics stand in x")
    if kind == "seeds" and (panel.y or not one_x or panel.x == ["step"]):
        raise ValueError(f"{place}: seeds need one x and no y")
    if kind in ("curves", "scatter", "pareto", "sweep") and (not panel.y or not one_x):
        raise ValueError(f"{place}: {kind} need one x and one y")
    if kind == "curves" and panel.x[0] not in STEPS:
        raise ValueError(f"{place}.x: {panel.x[0]!r}, legal for curves: {', '.join(STEPS)}")
    if kind == "parallel" and (not panel.y or len(panel.x) < 2):
        raise ValueError(f"{place}: parallel coordinates need two or more keys in x, and a y")
    if kind == "heatmap" and (not panel.y or not panel.z or not one_x):
        raise ValueError(f"{place}: a heatmap needs one key in x, one in y, and a number in z")
    if kind in KEY_KINDS and not x_given:
        raise ValueError(f"key '{place}.x' is missing; a {kind} panel needs its config keys")
    if panel.z and kind != "heatmap":
        raise ValueError(f"{place}.z: only a heatmap has one")
    if panel.log and kind != "pareto":
        raise ValueError(f"{place}.log: {kind} have none; legal for pareto")
    if panel.by and kind not in ("curves", "sweep"):
        raise ValueError(f"{place}.by: {kind} have none; legal for curves and sweep")


def _check_keys(panel: PanelSpec, place: str) -> None:
    """Raise ValueError where a number stands in the place of a key, or a key stands there twice."""
    seen: set[str] = set()
    for entry, keys in panel.keys.items():
        for key in keys:
            try:
                quantity(key)
            except ValueError:
                pass
            else:
                raise ValueError(
                    f"{place}.{entry}: {key!r} is a number that comes out of a run; legal: a "
                    "config group or a dotted config path"
                )
            if key in seen:
                raise ValueError(f"{place}.{entry}: {key!r} stands in this panel more than once")
            seen.add(key)


def _check_numbers(panel: PanelSpec, place: str) -> None:
    """Raise ValueError where a number is unknown, or cannot be shown by this kind of panel."""
    units = set()
    for entry, names in panel.numbers.items():
        for name in names:
            # Only bars know what a star stands for.
            plain = name.removesuffix("/*") if panel.kind == "bars" else name
            try:
                info, _ = quantity(plain)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            units.add(info.unit)
            if panel.kind == "pareto" and info.better is None:
                raise ValueError(
                    f"{place}.{entry}: {name} has no better end, so no row can be better than "
                    "another in it; a scatter shows it"
                )
    if panel.kind == "bars" and len(units) != 1:
        raise ValueError(f"{place}.x: bars share one axis, but these have {len(units)} units")
