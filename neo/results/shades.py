"""The range and the colours in which a metric's numbers are shown."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

from neo.results.metrics import Metric
from neo.results.scales import spans_a_decade


@dataclass(frozen=True)
class NumberScale:
    """The range in which a metric's numbers are shown, without its far outliers.

    Attributes:
        low, high: The ends.
        log: Whether the numbers in between span a decade.
        num_below, num_above: How many lie outside.
    """

    low: float
    high: float
    log: bool = False
    num_below: int = 0
    num_above: int = 0

    def norm(self) -> Normalize:
        """Return the map from the range to [0, 1] of a colour scale; what lies outside is cut."""
        kind = LogNorm if self.log else Normalize
        room = 0.0 if self.high > self.low else (abs(self.low) or 1.0) / 2  # all numbers are equal
        return kind(self.low - room, self.high + room, clip=True)

    @property
    def extend(self) -> str:
        """Which ends of a colour bar have an arrow, in Matplotlib's words."""
        return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[
            (min(self.num_below, 1), min(self.num_above, 1))
        ]


def number_scale(numbers: Sequence[float], better: str | None) -> NumberScale:
    """Return the range to show: one run that diverged shall not press all others into a line.

    What lies beyond the quartiles by more than three times their distance (Tukey's outer fence,
    Exploratory Data Analysis 1977, 2D; on the logarithms where all are positive) is outside; never
    the better end, nor anything among fewer than eight numbers.
    """
    positive = min(numbers) > 0
    use = [math.log(number) for number in numbers] if positive else list(numbers)
    low, high = min(use), max(use)
    if len(use) >= 8:
        first, _, third = statistics.quantiles(use, n=4, method="inclusive")
        fence = 3 * (third - first)
        if fence > 0:
            if better != "lower":
                low = min(n for n in use if n >= first - fence)
            if better != "higher":
                high = max(n for n in use if n <= third + fence)
    kept = [number for number, n in zip(numbers, use, strict=True) if low <= n <= high]
    return NumberScale(
        low=min(kept),
        high=max(kept),
        log=spans_a_decade([min(kept), max(kept)]),
        num_below=sum(n < low for n in use),
        num_above=sum(n > high for n in use),
    )


def colours(better: str | None) -> LinearSegmentedColormap:
    """Return viridis, even in lightness and safe for the colour-blind, its dark end the better."""
    # Without the last tenth: that yellow is hard to see on white.
    whole = [colormaps["viridis"](0.9 * i / 255) for i in range(256)]
    turned = whole[::-1] if better == "higher" else whole
    return LinearSegmentedColormap.from_list("quality", turned)


def colour_bar(axes: Axes, shown: NumberScale, info: Metric, text: str) -> None:
    """Draw the colour bar of the panel beside it."""
    mappable = ScalarMappable(shown.norm(), colours(info.better))
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(
        mappable, ax=axes, extend=shown.extend, pad=0.015, fraction=0.05, aspect=25
    )
    bar.outline.set_visible(False)
    bar.set_label(text)
