import numpy as np
import pytest

from neo.teachers.fixed_point import (
    from_fixed16,
    to_fixed16,
    to_fixed16_at_random,
    to_int8_at_random,
)


def test_nats_are_within_half_a_step_and_infinity_stays():
    x = np.random.default_rng(0).uniform(-8, 23.99, 10_000)
    found = from_fixed16(to_fixed16(x))
    assert found.dtype == np.float32
    assert np.abs(found - x).max() <= 2**-12
    assert np.abs(found - x).max() > 2**-12 * 0.99  # and no finer than it says
    np.testing.assert_array_equal(
        from_fixed16(to_fixed16(np.array([np.inf, 99.0, -9.0]))), [np.inf, 24 - 2 * 2**-11, -8]
    )


def test_every_code_is_a_number_of_its_own():
    codes = np.arange(2**16).astype(np.uint16)
    numbers = from_fixed16(codes)
    assert (np.diff(numbers[:-1]) == 2**-11).all()
    np.testing.assert_array_equal(to_fixed16(numbers), codes)
    np.testing.assert_array_equal(to_fixed16_at_random(numbers, np.full(2**16, 0.999)), codes)


@pytest.mark.parametrize("x", [-7.9999, 0.00031, 3.14159, 23.9993, 24.4, 26.0])
def test_weights_rounded_at_random_are_right_on_average(x):
    num = 400_000
    uniform = (np.arange(num) + 0.5) / num  # every part of [0, 1) alike: no noise but 1 / num
    weights = np.exp(-from_fixed16(to_fixed16_at_random(np.full(num, x), uniform)).astype(float))
    assert len(np.unique(weights)) == 2
    assert weights.mean() == pytest.approx(np.exp(-x), rel=1e-5)
    if 0 < x < 23:  # which rounding to nearest does not do
        nearest = np.exp(-from_fixed16(to_fixed16(np.array([x]))).astype(float))
        assert nearest[0] != pytest.approx(np.exp(-x), rel=1e-5)


def test_int8_is_right_on_average_and_within_a_step():
    rows = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    rows[2] = 0
    num = 2000
    sums = np.zeros(rows.shape)
    for number in range(num):
        integers, scale = to_int8_at_random(rows, np.full(rows.shape, (number + 0.5) / num))
        assert integers.dtype == np.int8
        found = integers * scale[:, None]
        assert (np.abs(found - rows) <= scale[:, None] * 1.00001).all()
        sums += found
    np.testing.assert_allclose(scale, np.abs(rows).max(1) / 127, rtol=1e-6)
    np.testing.assert_allclose(sums / num, rows, atol=scale.max() / num)
    assert np.abs(integers).max() == 127


def test_rows_of_no_or_tiny_numbers_stay_finite():
    rows = np.array([[0.0, 0.0], [1e-45, -1e-45], [1e-38, 3e-39]], dtype=np.float32)
    integers, scale = to_int8_at_random(rows, np.full(rows.shape, 0.5, dtype=np.float32))
    assert np.isfinite(integers * scale[:, None]).all()
    empty, none = to_int8_at_random(rows[:0], rows[:0])
    assert empty.shape == (0, 2)
    assert none.shape == (0,)
