"""What a search varies: parameters in Hydra's own grammar, read into choices and intervals."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from neo.config import open_groups

TAGS = {"log"}
LEGAL = "choice(8,16), range(1,5), interval(0,0.3) or tag(log,interval(1e-5,1e-1))"


@dataclass(frozen=True)
class Choices:
    """Values without an order, spelt as they are typed."""

    values: tuple[str, ...]

    def points(self) -> list[str]:
        """All of them."""
        return list(self.values)


@dataclass(frozen=True)
class Numbers:
    """Numbers from `low` to `high`, both included.

    Attributes:
        log: Equal ratios are equally likely, not equal differences.
        step: Between neighbours; None where every number in between may be drawn.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @property
    def whole(self) -> bool:
        """Whether they are integers."""
        return isinstance(self.low, int)

    def points(self) -> list[int] | list[float] | None:
        """All of them in order, or None where they cannot be listed."""
        if self.step is None:
            return None
        num = round((self.high - self.low) / self.step) + 1
        return [_tidy(self.low + i * self.step) for i in range(num)]


Dimension = Choices | Numbers
Space = Mapping[str, Dimension]  # by the key of an override, such as optim.lr


def read_space(
    params: Mapping[str, Any], typed: Iterable[str]
) -> tuple[dict[str, Dimension], list[str]]:
    """What is searched, and the overrides that all trials share.

    Args:
        params: Of the sweeper's config; a value without a sweep in it is shared by all trials.
        typed: Overrides of the command line, which count more.

    Raises:
        ValueError: With all that cannot be searched.
    """
    parser = OverridesParser.create()
    space: dict[str, Dimension] = {}
    fixed: dict[str, str] = {}
    problems = []
    for text in [*open_groups([f"{key}={value}" for key, value in params.items()]), *typed]:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(f"{text}: {' '.join(str(error).split())}")
            continue
        name = override.key_or_group
        for known in (space, fixed):  # the last one counts
            for key in [k for k in known if k.lstrip("+") == name]:
                del known[key]
        if not override.is_sweep_override():
            fixed[name] = text
            continue
        try:
            space[override.get_key_element().removeprefix("++")] = _dimension(override)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if not space and not problems:
        problems.append(f"params: nothing is searched; give a key {LEGAL}")
    if problems:
        raise ValueError("\n".join(problems))
    return space, list(fixed.values())


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """Every point of a space, the last key varying fastest.

    Raises:
        ValueError: A dimension has no end of points.
    """
    listed = {key: dimension.points() for key, dimension in space.items()}
    if endless := [key.lstrip("+") for key, points in listed.items() if points is None]:
        raise ValueError(
            f"sampler=grid: {', '.join(endless)} cannot be listed; give choice(...) or range(...)"
        )
    for values in itertools.product(*(points or [] for points in listed.values())):
        yield dict(zip(listed, values, strict=True))


def typed(point: Mapping[str, Any]) -> list[str]:
    """The overrides of a point of a space, as they are typed."""
    return open_groups([f"{key}={value}" for key, value in point.items()])


def spelt(point: Mapping[str, Any]) -> str:
    """The overrides of a point in one line, for people to read."""
    return " ".join(override.removeprefix("++") for override in typed(point))


def _dimension(override: Override) -> Dimension:
    value = override.value()
    if unknown := set(getattr(value, "tags", ())) - TAGS:
        raise ValueError(f"tag {', '.join(sorted(unknown))} means nothing here; legal: log")
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        return _numbers(value.start, value.end, log, 1 if _whole(value.start, value.end) else None)
    if isinstance(value, RangeSweep):
        points = [float(text) for text in override.sweep_string_iterator()]
        if not points:
            raise ValueError(f"{_shown(override)} is empty")
        ends = [value.start, value.stop, value.step]
        if _whole(*ends):
            return _numbers(int(min(points)), int(max(points)), log, abs(int(value.step)))
        return _numbers(min(points), max(points), log, abs(float(value.step)))
    if not isinstance(value, ChoiceSweep):
        raise ValueError(f"{_shown(override)} cannot be searched; legal: {LEGAL}")
    if log:
        raise ValueError(f"{_shown(override)}: choices have no order, so no log")
    values = tuple(str(text) for text in override.sweep_string_iterator())
    if len(set(values)) < max(2, len(values)):
        raise ValueError(f"{_shown(override)}: two choices at least, each once")
    return Choices(values)


def _numbers(low: int | float, high: int | float, log: bool, step: int | float | None) -> Numbers:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"from {low:g} to {high:g}: the first must be below the second")
    if log and low <= 0:
        raise ValueError(f"from {low:g} with log: must begin above 0")
    if log and step not in (None, 1):
        raise ValueError(f"a step of {step:g} with log: a step or log, not both")
    if log and isinstance(step, float):
        raise ValueError("a range of fractions with log: use tag(log,interval(...))")
    return Numbers(low, high, log, step)


def _whole(*numbers: Any) -> bool:
    return all(isinstance(number, int) for number in numbers)


def _tidy(number: int | float) -> int | float:
    """Without the digits that adding up decimal fractions leaves behind."""
    return number if isinstance(number, int) else float(f"{number:.12g}")


def _shown(override: Override) -> str:
    return str(override.get_value_string())
