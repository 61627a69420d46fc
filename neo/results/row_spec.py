"""What one row of a table is to show: runs that match, or numbers quoted from elsewhere."""

import math
from dataclasses import dataclass, field
from typing import Any

from neo.results.entries import Entries
from neo.results.metrics import SHARE, quantity

Scalar = str | int | float | bool | None
Value = Scalar | list[Scalar]  # a list of values stands for itself where it stands in a list


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """One row of a table: the runs that match every entry of `where`, or quoted numbers.

    Attributes:
        label: As printed.
        where: Config group or dotted config path to the values it may have, where null is also
            a key that the run does not have; empty where quoted.
        group: Rows are compared with rows of the same group only.
        reference: Shown but not compared, such as the teacher; without a group it goes with all.
            A quoted row is one, too.
        paper: Column to the published number, in the column's printed unit.
        pending: Whether the row may stand in a table that has no record yet.
        quoted: Column to the number that the source gives, in the recorded unit; None where the
            source lacks it.
        source: Where the quoted numbers stand; empty in a row of runs.
    """

    label: str
    where: dict[str, list[Value]] = field(default_factory=dict)
    group: str = ""
    reference: bool = False
    paper: dict[str, float | int] = field(default_factory=dict)
    pending: bool = False
    quoted: dict[str, float | int | None] = field(default_factory=dict)
    source: str = ""

    @property
    def name(self) -> str:
        """Group and label, which no other row of the table has together."""
        return f"{self.group}, {self.label}" if self.group else self.label

    @property
    def is_quoted(self) -> bool:
        """Whether the numbers come from elsewhere and no run stands behind them."""
        return bool(self.source)


def read_row(node: Any, place: str) -> RowSpec:
    """Return the row that the YAML holds at `place`, such as `rows[0]`.

    Raises:
        ValueError: A key is unknown, missing or of the wrong type, `where` or `quoted` names
            nothing, or a quoted number cannot be one of its metric.
    """
    entries = Entries(node, place)
    if "quoted" in entries.left:
        return _quoted_row(entries, place)
    where = entries.take("where", dict)
    if not where:
        raise ValueError(f"{place}.where: names nothing, so every run would match")
    paper = entries.take("paper", dict, default={})
    for key, value in paper.items():
        if not _is_number(value):
            raise ValueError(f"{place}.paper.{key}: {value!r} is not a number")
    row = RowSpec(
        label=entries.take("label", str),
        where={
            str(key): value if isinstance(value, list) else [value] for key, value in where.items()
        },
        group=entries.take("group", str, default=""),
        reference=entries.take("reference", bool, default=False),
        paper=paper,
        pending=entries.take("pending", bool, default=False),
    )
    entries.finish()
    return row


def _quoted_row(entries: Entries, place: str) -> RowSpec:
    """Return a row of quoted numbers."""
    if "where" in entries.left:
        raise ValueError(f"{place}: has 'where' and 'quoted'; a row is measured or quoted")
    quoted = entries.take("quoted", dict)
    if not quoted:
        raise ValueError(f"{place}.quoted: names no number")
    for key, value in quoted.items():
        _check_quoted(key, value, f"{place}.quoted.{key}")
    row = RowSpec(
        label=entries.take("label", str),
        group=entries.take("group", str, default=""),
        reference=True,
        quoted=quoted,
        source=entries.take("source", str).strip(),
    )
    entries.finish()
    if not row.is_quoted:
        raise ValueError(f"{place}.source: is empty; say where the quoted numbers stand")
    return row


def _check_quoted(key: str, value: Any, place: str) -> None:
    """Raise ValueError unless the value is None or a number that the metric `key` may have."""
    try:
        info, _ = quantity(str(key))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if value is None:
        return
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(f"{place}: {value!r} is not a number; null where the source gives none")
    if info.unit == SHARE and not 0 <= value <= 1:
        raise ValueError(f"{place}: {value!r} is no share from 0 to 1, which is its unit here")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
