"""Numbers compared pair by pair: mean difference, its interval, t test, Holm's correction."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from neo.results.bootstrap import bootstrap_interval

CONFIDENCE = 0.95
ROUNDING = 1e-12  # differences that spread less than this share of the numbers are equal


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences, in the unit of the numbers.

    Attributes:
        difference: Mean of the differences.
        low: Lower end of its 95 % confidence interval.
        high: Upper end.
        p: Of the two-sided paired t test; None where all differences are equal, so that there is no
            spread to hold the mean against.
        n: Number of pairs.
    """

    difference: float
    low: float
    high: float
    p: float | None
    n: int


def paired_t(
    numbers: Sequence[float], baseline: Sequence[float], interval: str = "t"
) -> Paired | None:
    """Return how `numbers` differ from `baseline`, pair by pair; None for fewer than two pairs.

    Args:
        numbers: One of each pair.
        baseline: The other, in the same order.
        interval: "t", by the t distribution, or "bootstrap". The test is the t test with both.

    Raises:
        ValueError: The two are not equally long.

    Example:
        >>> result = paired_t([3.0, 5.0, 7.0], [1.0, 2.0, 3.0])
        >>> result.difference, round(result.p, 4)
        (3.0, 0.0351)
    """
    differences = [a - b for a, b in zip(numbers, baseline, strict=True)]
    n = len(differences)
    if n < 2:
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread <= ROUNDING * max(abs(number) for number in (*numbers, *baseline)):
        return Paired(mean, mean, mean, None, n)
    error = spread / math.sqrt(n)
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    if interval == "bootstrap":
        return Paired(mean, *bootstrap_interval(differences, CONFIDENCE), p, n)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return Paired(mean, mean - reach, mean + reach, p, n)


def holm(ps: Sequence[float]) -> list[float]:
    """Return the p-values after Holm's correction (1979) for testing all of them at once.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected
