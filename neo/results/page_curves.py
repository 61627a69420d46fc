"""The learning curves that report.html draws: read from logs, and thinned to a bearable size."""

import csv
import math
from pathlib import Path

from neo.results.curves import Curve
from neo.results.metrics import metric_info

# Points that all curves of a page may have together: about 6 MB.
MAX_POINTS = 400_000
# Of one curve: at least enough for its shape, at most as many as a screen shows apart.
FEWEST_POINTS, MOST_POINTS = 32, 400


def read_curves(path: Path) -> tuple[dict[str, Curve], dict[str, int]]:
    """Return the logged (step, value) pairs of every metric in a `metrics.csv`, in order of steps.

    Where a run was resumed and logged a step twice, the later value stands. The second result
    counts the values that are no finite number and are left out, by metric.

    Raises:
        ValueError: A column is no metric, or a logged cell is not a number.
    """
    curves: dict[str, dict[float, float]] = {}
    unusable: dict[str, int] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or [] if name != "step"]
        for name in names:
            try:
                metric_info(name)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        for row in reader:
            for name in names:
                if not row.get("step") or not row.get(name):
                    continue
                try:
                    step, value = float(row["step"]), float(row[name])
                except ValueError as error:
                    raise ValueError(f"{path}: column {name!r}: {error}") from error
                if math.isfinite(value):
                    curves.setdefault(name, {})[step] = value
                else:
                    unusable[name] = unusable.get(name, 0) + 1
    return {name: sorted(curve.items()) for name, curve in curves.items()}, unusable


def points_per_curve(num_curves: int) -> int:
    """Return how many points a curve may have, on a page with so many curves."""
    return max(FEWEST_POINTS, min(MOST_POINTS, MAX_POINTS // max(num_curves, 1)))


def thin(curve: Curve, limit: int) -> Curve:
    """Return at most `limit` of the points: both ends, and of each stretch the lowest and highest.

    Example:
        >>> thin([(0.0, 5.0), (1.0, 1.0), (2.0, 9.0), (3.0, 4.0), (4.0, 6.0)], 4)
        [(0.0, 5.0), (1.0, 1.0), (2.0, 9.0), (4.0, 6.0)]
    """
    if len(curve) <= limit:
        return curve
    inner = curve[1:-1]
    stretches = (limit - 2) // 2
    kept = [curve[0]]
    for i in range(stretches):
        stretch = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return [*kept, curve[-1]]


def short(number: float) -> float | int:
    """Return the number with eight digits, as many as the log has; whole ones as they are."""
    if number == int(number) and abs(number) < 2**53:
        return int(number)
    return float(f"{number:.8g}")
