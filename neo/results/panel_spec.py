"""What a panel of the figure is to show: the strict reading of one entry of `figures`."""

from dataclasses import dataclass
from typing import Any

from neo.results.entries import Entries
from neo.results.metrics import quantity

PANEL_KINDS = ("bars", "curves", "scatter", "seeds")


@dataclass(frozen=True, kw_only=True)
class PanelSpec:
    """One panel of the figure.

    Attributes:
        kind: "bars" (x: metrics, `/*` stands for all kinds of one), "curves" (x: the step, y: a
            logged metric), "scatter" (x and y: a metric or record field each) or "seeds" (x: one
            metric or record field, a dot per seed on a line per row).
        x: One or more names.
        y: Name of what is drawn upwards; bars and seeds have none.
        title: Above the panel; made from the metrics where empty.
    """

    kind: str
    x: list[str]
    y: str = ""
    title: str = ""


def read_panel(node: Any, place: str) -> PanelSpec:
    """Return the panel that the YAML node at `place` describes.

    Raises:
        ValueError: A key is unknown, missing or of another type, or the panel cannot be drawn.
    """
    entries = Entries(node, place)
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
    if panel.kind == "seeds" and (panel.y or len(panel.x) != 1 or panel.x == ["step"]):
        raise ValueError(f"{place}: seeds need one x and no y")
    if panel.kind in ("curves", "scatter") and (not panel.y or len(panel.x) != 1):
        raise ValueError(f"{place}: {panel.kind} need one x and one y")
    if panel.kind == "curves" and panel.x != ["step"]:
        raise ValueError(f"{place}.x: {panel.x[0]!r}, legal for curves: step")
    names = {"curves": [panel.y], "scatter": [*panel.x, panel.y]}.get(panel.kind, panel.x)
    plain = panel.kind == "bars"  # only bars know what a star stands for
    try:
        units = {
            quantity(str(name).removesuffix("/*") if plain else str(name))[0].unit for name in names
        }
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if panel.kind == "bars" and len(units) != 1:
        raise ValueError(f"{place}.x: bars share one axis, but these have {len(units)} units")
    return panel
