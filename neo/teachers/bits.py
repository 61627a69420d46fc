"""Whole numbers in as few bits as hold them, one behind the other."""

import numpy as np


def num_bits(vocab: int) -> int:
    """How many bits an id below `vocab` takes.

    Example:
        >>> [num_bits(vocab) for vocab in (1, 2, 128, 129, 128_256)]
        [0, 1, 7, 8, 17]
    """
    return (vocab - 1).bit_length()


def num_packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many numbers take together."""
    return (count * bits + 7) // 8


def pack(numbers: np.ndarray, bits: int) -> bytes:
    """The numbers in `bits` bits each, the first in the lowest bits of the first byte.

    Args:
        numbers: Whole, at least 0 and below 2^`bits`, of any shape; they are taken row by row.
        bits: At most 32.

    Raises:
        ValueError: One of them does not fit.
    """
    flat = np.ascontiguousarray(numbers).reshape(-1)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >> bits):
        raise ValueError(f"numbers from {flat.min()} to {flat.max()} do not fit into {bits} bits")
    # Eight numbers take `bits` whole bytes: each of the eight has the same place in all groups.
    groups = np.zeros((-(-flat.size // 8), 8), dtype=np.uint64)
    groups.reshape(-1)[: flat.size] = flat
    packed = np.zeros((len(groups), bits), dtype=np.uint8)
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        shifted = groups[:, place] << np.uint64(shift)
        for number in range((shift + bits + 7) // 8):
            packed[:, first + number] |= (shifted >> np.uint64(8 * number)).astype(np.uint8)
    return packed.tobytes()[: num_packed_bytes(flat.size, bits)]


def unpack(packed: np.ndarray, count: int, bits: int, out: np.ndarray | None = None) -> np.ndarray:
    """The first `count` numbers of what `pack` gave.

    Args:
        packed: Bytes, as uint8.
        count: How many numbers.
        bits: Of each.
        out: int64 or int32, of `count` numbers, to be filled; None makes it, int64.
    """
    numbers = np.empty(count, dtype=np.int64) if out is None else out
    if bits == 0 or count == 0:
        numbers[:] = 0
        return numbers
    # A number is read with the whole word that begins in its byte, so there must be bytes behind.
    word = np.dtype("<u4" if bits <= 25 else "<u8")
    num_groups = -(-count // 8)
    padded = np.zeros(num_groups * bits + word.itemsize, dtype=np.uint8)
    num_bytes = num_packed_bytes(count, bits)
    padded[:num_bytes] = packed[:num_bytes]
    groups = np.empty((num_groups, 8), dtype=word)
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        words = np.ndarray((num_groups,), word, buffer=padded.data, offset=first, strides=(bits,))
        np.right_shift(words, word.type(shift), out=groups[:, place])
    groups &= word.type((1 << bits) - 1)
    numbers[:] = groups.reshape(-1)[:count]
    return numbers
