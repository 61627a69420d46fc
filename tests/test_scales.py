import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from neo.results.scales import INCHES_PER_CHARACTER, key_scale, show_key_scale, thinned

NUMBERS = st.lists(
    st.integers(-5, 70) | st.floats(1e-7, 1e3) | st.floats(-10, 10).map(lambda x: round(x, 6)),
    min_size=1,
    max_size=12,
)


@given(NUMBERS)
def test_numbers_stand_in_their_order_and_on_a_log_axis_where_they_span_a_positive_decade(values):
    scale = key_scale(values)
    assert scale.is_numeric
    assert scale.places == sorted({float(value) for value in values})
    assert all(scale.places[scale.index(value)] == value for value in values)
    assert len(set(scale.labels)) == len(scale.places)
    low, high = scale.places[0], scale.places[-1]
    if not math.isclose(high, 10 * low):
        assert scale.log == (low > 0 and high > 10 * low)


@pytest.mark.parametrize(("values", "log"), [([1, 10], True), ([1, 9.9], False), ([0, 10], False)])
def test_ten_times_is_a_decade_and_nine_times_or_a_zero_is_none(values, log):
    assert key_scale(values).log == log
    axes = Figure().subplots()
    show_key_scale(axes, "x", key_scale(values), 4.0)
    assert axes.get_xscale() == ("log" if log else "linear")


@given(NUMBERS)
def test_shares_of_the_axis_rise_from_end_to_end(values):
    scale = key_scale(values)
    shares = scale.shares
    if len(shares) == 1:
        assert shares == [0.5]
        return
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert shares == sorted(shares)
    if scale.log and len(shares) > 2:  # equal ratios are equal distances
        ratio = math.log(scale.places[1] / scale.places[0], scale.places[-1] / scale.places[0])
        assert shares[1] == pytest.approx(ratio, abs=1e-9)


def test_texts_are_categories_as_they_come_and_true_is_no_number():
    scale = key_scale(["dora", "lora", "dora", True, None, [1, 2]])
    assert not scale.is_numeric
    assert scale.labels == ["dora", "lora", "true", "null", "[1, 2]"]
    assert scale.places == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert scale.index(True) == 2


def test_numbers_among_other_values_are_categories_that_come_first_in_their_order():
    assert key_scale([None, 16, 4, "auto"]).labels == ["4", "16", "null", "auto"]


def test_labels_are_short_where_that_tells_the_numbers_apart():
    assert key_scale([1e-4, 0.0030000001, 16, 20_000]).labels == ["0.0001", "0.003", "16", "20000"]
    assert key_scale([0.12345, 0.12346]).labels == ["0.12345", "0.12346"]


def test_few_values_have_a_tick_each_and_many_have_round_ones_between_their_ends():
    assert key_scale([4, 8, 16]).ticks() == ([4.0, 8.0, 16.0], ["4", "8", "16"])
    values = [0.00012 * 1.31**i for i in range(20)]
    places, labels = key_scale(values).ticks()
    assert labels == ["0.0003", "0.001", "0.003", "0.01"]
    assert all(values[0] <= place <= values[-1] for place in places)


@given(st.lists(st.text("0123456789", min_size=1, max_size=9), min_size=1, max_size=12), st.data())
def test_no_label_that_is_left_touches_another(labels, data):
    shares = sorted(data.draw(st.floats(0, 1)) for _ in labels)
    shown = thinned(labels, shares, 4.0)
    assert all(text in ("", label) for text, label in zip(shown, labels, strict=True))
    assert shown[0] == labels[0]
    left = [(4 * share, text) for share, text in zip(shares, shown, strict=True) if text]
    for (start, first), (end, second) in pairwise(left):
        assert end - start >= INCHES_PER_CHARACTER * (len(first) + len(second)) / 2 - 1e-9


@pytest.mark.parametrize("values", [[1, 2, 3], [1e-4, 1e-2], ["a", "b"], [5]])
def test_the_axis_holds_every_value(values):
    axes = Figure().subplots()
    show_key_scale(axes, "y", key_scale(values), 4.0)
    low, high = axes.get_ylim()
    assert all(low < place < high for place in key_scale(values).places)
