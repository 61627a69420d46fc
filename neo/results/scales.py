"""How the values of a config key are laid along an axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from neo.results.summary import spell

INCHES_PER_CHARACTER = 0.085  # of a tick label, at the figures' 11 points
MAX_TICKS = (
    8  # values of a key with a tick each; of more, as in a random search, it is round numbers
)


@dataclass(frozen=True)
class KeyScale:
    """The distinct values of a config key in the order of an axis.

    Attributes:
        labels: As printed, one a value.
        values: What tells the values apart: numbers, or else texts as they would be typed.
        log: Whether the numbers stand on a logarithmic axis.
    """

    labels: list[str]
    values: list[float] | list[str]
    log: bool = False

    @property
    def is_numeric(self) -> bool:
        """Whether the values are numbers."""
        return isinstance(self.values[0], float)

    @property
    def places(self) -> list[float]:
        """Where each value stands on an axis: at the number itself, or at its category's index."""
        if self.is_numeric:
            return [float(value) for value in self.values]
        return [float(index) for index in range(len(self.values))]

    @property
    def shares(self) -> list[float]:
        """Where between the ends, 0 and 1, each value stands; alone it stands in the middle."""
        return self.between(self.places)

    def between(self, places: Sequence[float]) -> list[float]:
        """Return where between the ends of the axis, 0 and 1, the places lie."""
        change = math.log if self.log else float
        low, high = change(self.places[0]), change(self.places[-1])
        return [(change(p) - low) / (high - low) if high > low else 0.5 for p in places]

    def index(self, value: Any) -> int:
        """Return which of the values, from 0, the config value is."""
        return self.values.index(float(value) if self.is_numeric else spell(value))  # type: ignore[arg-type]

    def ticks(self) -> tuple[list[float], list[str]]:
        """Return places and labels of ticks: every value, or round numbers where there are many."""
        if not self.is_numeric or len(self.values) <= MAX_TICKS:
            return self.places, self.labels
        low, high = self.places[0], self.places[-1]
        locator = LogLocator(subs=(1, 3)) if self.log else MaxNLocator(5)
        found = [float(n) for n in locator.tick_values(low, high) if low <= n <= high]
        return found, [_short(number) for number in found]


def key_scale(values: Sequence[Any]) -> KeyScale:
    """Return the scale of the values, one or more: numbers in their order, others as they come.

    Numbers stand on a logarithmic axis where they are positive and span a decade. Where only some
    are numbers, all are categories, the numbers first.
    """
    numbers = sorted(value for value in values if is_number(value))
    if len(numbers) == len(values):
        known = list(dict.fromkeys(float(number) for number in numbers))
        ways = [[_short(number, digits) for number in known] for digits in (3, 6, 17)]
        labels = next(way for way in ways if len(set(way)) == len(known))
        return KeyScale(labels, known, spans_a_decade(known))
    others = [value for value in values if not is_number(value)]
    texts = list(dict.fromkeys(spell(value) for value in [*numbers, *others]))
    return KeyScale(texts, texts)


def show_key_scale(axes: Axes, which: str, scale: KeyScale, inches: float) -> None:
    """Give the axis, x or y, the scale, ticks, and the labels that fit into `inches`."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    places, labels = scale.ticks()
    turn: dict[str, Any] = {}
    if scale.is_numeric:
        axes.set(**{f"{which}scale": "log" if scale.log else "linear"})
        axis.set_minor_locator(NullLocator())
        if which == "x":
            labels = thinned(labels, scale.between(places), inches)
    elif which == "x" and _width(labels) > inches / len(labels):
        turn = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axis.set_ticks(places, labels, **turn)
    # All values, those of failed runs too.
    low, high = scale.places[0], scale.places[-1]
    if scale.log:
        room = (high / low) ** 0.05
        low, high = low / room, high * room
    elif scale.is_numeric:
        room = 0.05 * (high - low) or 0.5
        low, high = low - room, high + room
    else:
        low, high = low - 0.5, high + 0.5
    axes.set(**{f"{which}lim": (low, high)})


def thinned(labels: list[str], shares: list[float], inches: float) -> list[str]:
    """Return the labels with an empty text for each that would touch the one before it."""
    shown: list[str] = []
    end = -math.inf
    for label, share in zip(labels, shares, strict=True):
        half = INCHES_PER_CHARACTER * (len(label) + 1) / 2
        fits = share * inches - half >= end
        shown.append(label if fits else "")
        end = share * inches + half if fits else end
    return shown


def spans_a_decade(numbers: Sequence[float]) -> bool:
    """Return whether the numbers are positive and the largest is ten times the smallest or more."""
    return min(numbers) > 0 and max(numbers) / min(numbers) >= 10 - 1e-9


def is_number(value: object) -> bool:
    """Return whether the config value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(number: float, digits: int = 3) -> str:
    return str(int(number)) if number.is_integer() and abs(number) < 1e6 else f"{number:.{digits}g}"


def _width(labels: Sequence[str]) -> float:
    return INCHES_PER_CHARACTER * (max(len(label) for label in labels) + 1)
