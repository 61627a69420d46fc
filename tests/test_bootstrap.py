import itertools
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from neo.results.bootstrap import COVERAGE, RESAMPLES, bootstrap_interval
from neo.results.paired import paired_t

NORMAL = statistics.NormalDist()


def exact_ends(numbers, level):
    """The BCa ends at `level` and 1 - `level` over all n^n resamples, by Efron's equations."""
    n, mean = len(numbers), statistics.fmean(numbers)
    means = sorted(statistics.fmean(sample) for sample in itertools.product(numbers, repeat=n))
    below = sum(m < mean - 1e-9 for m in means) + sum(abs(m - mean) <= 1e-9 for m in means) / 2
    bias = NORMAL.inv_cdf(below / n**n)
    left_out = [(sum(numbers) - x) / (n - 1) for x in numbers]
    apart = [statistics.fmean(left_out) - x for x in left_out]
    bend = sum(d**3 for d in apart) / (6 * sum(d**2 for d in apart) ** 1.5)
    ends = []
    for z in (NORMAL.inv_cdf(level), NORMAL.inv_cdf(1 - level)):
        share = NORMAL.cdf(bias + (bias + z) / (1 - bend * (bias + z)))
        ends.append(means[min(n**n - 1, max(0, math.ceil(share * n**n) - 1))])
    return ends


@pytest.mark.parametrize("n", [3, 4, 5])
def test_the_ends_are_those_of_all_resamples_written_out(n):
    rng = random.Random(n)
    # How far a share of 0.025 goes astray in so many random resamples, four times over.
    slack = 4 * math.sqrt(0.025 * 0.975 / RESAMPLES)
    for _ in range(4):
        numbers = [rng.gauss(0.3, 1.0) ** 3 for _ in range(n)]
        low, high = bootstrap_interval(numbers, 0.95)
        outer, inner = exact_ends(numbers, 0.025 - slack), exact_ends(numbers, 0.025 + slack)
        assert outer[0] - 1e-9 <= low <= inner[0] + 1e-9
        assert inner[1] - 1e-9 <= high <= outer[1] + 1e-9


def test_of_many_pairs_the_interval_is_that_of_the_t_distribution():
    rng = random.Random(0)
    numbers = [rng.gauss(2.0, 1.0) for _ in range(300)]
    baseline = [0.0] * 300
    t, bootstrap = (paired_t(numbers, baseline, kind) for kind in ("t", "bootstrap"))
    width = t.high - t.low
    assert (bootstrap.low, bootstrap.high) == pytest.approx((t.low, t.high), abs=0.05 * width)
    assert (bootstrap.low, bootstrap.high) != (t.low, t.high)
    assert (bootstrap.difference, bootstrap.p, bootstrap.n) == (t.difference, t.p, t.n)


@pytest.mark.parametrize("n", sorted(COVERAGE))
def test_few_numbers_hold_the_mean_as_seldom_as_the_note_says(n):
    drawn = np.random.default_rng(n).normal(size=(3000, n))
    found = stats.bootstrap(
        (drawn,), np.mean, axis=-1, n_resamples=999, rng=np.random.default_rng(0), batch=100
    ).confidence_interval
    held = np.mean((found.low <= 0) & (found.high >= 0))
    assert held == pytest.approx(COVERAGE[n] / 100, abs=0.025)
    assert COVERAGE[n] < 95


@settings(max_examples=30, deadline=None)
@given(numbers=st.lists(st.floats(-100, 100), min_size=2, max_size=8, unique=True))
def test_the_interval_knows_no_order_and_lies_within_the_numbers(numbers):
    low, high = bootstrap_interval(numbers, 0.95)
    assert bootstrap_interval(numbers[::-1], 0.95) == (low, high)
    assert bootstrap_interval(sorted(numbers, key=abs), 0.95) == (low, high)
    slack = 1e-12 * max(abs(number) for number in numbers)
    assert min(numbers) - slack <= low <= high <= max(numbers) + slack


def test_a_wider_confidence_gives_a_wider_interval():
    numbers = [0.1, 0.4, 0.2, 0.9, 0.3, 0.5]
    (low, high), (lower, higher) = (bootstrap_interval(numbers, c) for c in (0.8, 0.95))
    assert lower < low < statistics.fmean(numbers) < high < higher


@pytest.mark.parametrize("scale", [1e-200, 1e200, 2.0])
def test_the_unit_of_the_numbers_changes_nothing_else(scale):
    numbers = [1.0, 2.0, 4.0, 8.0]
    plain = bootstrap_interval(numbers, 0.95)
    scaled = bootstrap_interval([number * scale for number in numbers], 0.95)
    assert scaled == pytest.approx([end * scale for end in plain], rel=1e-12)


def test_differences_that_are_all_equal_need_no_resamples():
    result = paired_t([1.1, 2.1, 3.1], [1.0, 2.0, 3.0], "bootstrap")
    assert result.low == result.high == result.difference
    assert result.p is None
