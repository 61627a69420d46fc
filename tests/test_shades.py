import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from neo.results.metrics import metric_info
from neo.results.shades import colour_bar, colours, number_scale

USUAL = [0.36, 0.37, 0.38, 0.37, 0.36, 0.39, 0.38, 0.37]


def lightness(colour):
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


@pytest.mark.parametrize("better", ["lower", "higher", None])
def test_one_run_that_diverged_does_not_set_the_range_unless_it_is_the_better_end(better):
    shown = number_scale([*USUAL, 9.0], better)
    cut = better != "higher"
    assert (shown.num_above, shown.num_below) == (int(cut), 0)
    assert shown.high == (0.39 if cut else 9.0)
    assert shown.extend == ("max" if cut else "neither")
    low = number_scale([*USUAL, 1e-3], better)
    assert (low.num_below, low.low) == ((0, 1e-3) if better == "lower" else (1, 0.36))


def test_among_few_numbers_none_is_an_outlier():
    assert number_scale([*USUAL[:6], 9.0], "lower").high == 9.0


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.sampled_from(["lower", "higher"]))
def test_the_better_end_and_three_quarters_of_the_numbers_are_always_in_the_range(numbers, better):
    shown = number_scale(numbers, better)
    outside = [n for n in numbers if not shown.low <= n <= shown.high]
    assert len(outside) == shown.num_below + shown.num_above <= len(numbers) / 4
    best = min(numbers) if better == "lower" else max(numbers)
    assert best == (shown.low if better == "lower" else shown.high)
    assert not (shown.log and shown.low <= 0)
    assert 0 <= float(shown.norm()(best)) <= 1


def test_numbers_over_a_decade_have_a_log_range_in_which_equal_ratios_are_equal_steps():
    norm = number_scale([0.1, 1.0, 10.0], "lower").norm()
    assert [float(norm(n)) for n in (0.1, 1.0, 10.0)] == pytest.approx([0, 0.5, 1])


def test_equal_numbers_have_the_colour_in_the_middle():
    assert float(number_scale([0.4, 0.4], "lower").norm()(0.4)) == pytest.approx(0.5)


@pytest.mark.parametrize("better", ["lower", "higher", None])
def test_the_better_end_is_the_dark_one_and_lightness_changes_evenly(better):
    steps = [lightness(colours(better)(i / 20)) for i in range(21)]
    if better == "higher":
        steps.reverse()
    assert steps == sorted(steps)
    assert steps[0] < 0.15
    assert steps[-1] < 0.85  # still to be seen on white
    changes = [b - a for a, b in itertools.pairwise(steps)]
    assert max(changes) < 2.5 * min(changes)


def test_the_colour_bar_has_the_panels_range_and_an_arrow_for_what_lies_beyond():
    figure = Figure()
    shown = number_scale([*USUAL, 9.0], "lower")
    colour_bar(figure.subplots(), shown, metric_info("val/kd"), "val kd")
    bar = figure.axes[1]
    triangles = [patch for patch in bar.patches if len(patch.get_path().vertices) <= 4]
    assert len(triangles) == 1
    assert bar.get_ylim() == (0.36, 0.39)
    assert bar.get_ylabel() == "val kd"
    assert math.isclose(shown.norm().vmax, 0.39)
