import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from neo.results.paired import holm, paired_t

NUMBERS = st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=8)


@settings(max_examples=50, deadline=None)
@given(pairs=NUMBERS)
def test_difference_interval_and_p_are_those_of_scipys_paired_test(pairs):
    numbers, baseline = [a for a, _ in pairs], [b for _, b in pairs]
    differences = [a - b for a, b in pairs]
    assume(max(differences) - min(differences) > 1e-3)
    result = paired_t(numbers, baseline)
    oracle = stats.ttest_rel(numbers, baseline)
    interval = oracle.confidence_interval(0.95)
    assert result.p == pytest.approx(float(oracle.pvalue), rel=1e-6, abs=1e-12)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert result.difference == pytest.approx(math.fsum(differences) / len(pairs))
    assert result.n == len(pairs)


def test_the_interval_holds_zero_where_p_is_above_five_per_cent_and_not_below():
    for shift in (0.0, 0.5, 1.0, 1.5, 3.0):
        result = paired_t([shift + x for x in (0.0, 1.0, 2.0, 0.5, 1.5)], [1.0] * 5)
        assert (result.low <= 0 <= result.high) == (result.p > 0.05)


def test_what_a_seed_does_to_both_is_no_part_of_the_comparison():
    seeds = [0.0, 100.0, -50.0]
    result = paired_t([s + d for s, d in zip(seeds, (1.0, 1.1, 0.9), strict=True)], seeds)
    assert result.p < 0.01


@pytest.mark.parametrize("by", [0.0, 0.1])
def test_differences_that_are_all_equal_have_no_p(by):
    baseline = [0.1, 0.2, 0.7]
    result = paired_t([b + by for b in baseline], baseline)
    assert result.p is None
    assert result.low == result.high == result.difference == pytest.approx(by)


@pytest.mark.parametrize("numbers", [[], [1.0]])
def test_fewer_than_two_pairs_are_no_comparison(numbers):
    assert paired_t(numbers, numbers) is None


def test_numbers_without_their_pair_are_refused():
    with pytest.raises(ValueError, match="zip"):
        paired_t([1.0, 2.0], [1.0])


@settings(max_examples=100, deadline=None)
@given(ps=st.lists(st.floats(0, 1), max_size=12), level=st.floats(0.001, 0.5))
def test_holm_rejects_what_its_stepwise_rule_rejects(ps, level):
    rejected = set()
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if (len(ps) - rank) * ps[i] >= level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(ps)) if p < level} == rejected


@settings(max_examples=50, deadline=None)
@given(ps=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferronis(ps):
    for p, corrected in zip(ps, holm(ps), strict=True):
        assert p <= corrected <= min(1.0, len(ps) * p)


def test_holm_leaves_no_larger_p_below_a_smaller_one():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
