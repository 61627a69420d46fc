import numpy as np
import pytest

from neo.teachers.bits import num_bits, num_packed_bytes, pack, unpack

VOCABS = [1, 2, 3, 50, 256, 257, 65_536, 128_256, 2**24, 2**25 + 1, 2**31]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001])
def test_numbers_come_back_and_take_the_bits_that_they_need(vocab, count):
    bits = int(np.ceil(np.log2(vocab)))
    assert num_bits(vocab) == bits
    numbers = np.random.default_rng(0).integers(0, vocab, count)
    numbers[:2] = (0, vocab - 1)[:count]
    packed = pack(numbers, bits)
    assert len(packed) == num_packed_bytes(count, bits) == (count * bits + 7) // 8
    found = unpack(np.frombuffer(packed, np.uint8), count, bits)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, numbers)


def test_the_first_number_lies_in_the_lowest_bits_of_the_first_byte():
    assert pack(np.array([[5], [1], [7]]), 3) == bytes([0b11_001_101, 0b1])


def test_bytes_behind_the_numbers_change_nothing():
    packed = np.frombuffer(pack(np.arange(5), 3) + b"\xff" * 9, np.uint8)
    np.testing.assert_array_equal(unpack(packed, 5, 3), np.arange(5))


def test_the_numbers_may_go_where_they_are_wanted():
    out = np.full(7, -1, dtype=np.int32)
    unpack(np.frombuffer(pack(np.arange(5), 3), np.uint8), 5, 3, out[1:6])
    np.testing.assert_array_equal(out, [-1, 0, 1, 2, 3, 4, -1])


@pytest.mark.parametrize("numbers", [[-1, 0], [0, 8]])
def test_a_number_that_does_not_fit_is_refused(numbers):
    with pytest.raises(ValueError, match="do not fit into 3 bits"):
        pack(np.array(numbers), 3)
