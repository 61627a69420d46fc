"""Numbers in 16 or 8 bits: fixed16 of minus log-probabilities, int8 of rows of a matrix."""

import numpy as np

# A code c stands for c * STEP - OFFSET nats; the last one for infinity, which is probability 0.
STEP = 2.0**-11
OFFSET = 8.0
INFINITE = 2**16 - 1


def to_fixed16(x: np.ndarray) -> np.ndarray:
    """Codes of minus log-probabilities in nats, to nearest: within 2^-12 from -8 to 24.

    Example:
        >>> to_fixed16(np.array([-8.0, 0.0, 100.0, np.inf]))
        array([    0, 16384, 65534, 65535], dtype=uint16)
    """
    steps = (np.asarray(x, dtype=np.float64) + OFFSET) / STEP
    codes = np.rint(np.clip(steps, 0, INFINITE - 1)).astype(np.uint16)
    codes[np.isposinf(steps)] = INFINITE
    return codes


def to_fixed16_at_random(x: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Codes whose exp(-x) is right on average: one of the two codes around each number.

    Args:
        x: Minus log of weights, in nats.
        uniform: As many numbers drawn from [0, 1).
    """
    steps = np.clip((np.asarray(x, dtype=np.float64) + OFFSET) / STEP, 0, np.inf)
    below = np.floor(np.minimum(steps, INFINITE - 1))
    # The weight w lies between that of the code below, w0, and that of the next, w1: the next is
    # taken with probability (w0 - w) / (w0 - w1). Behind the last finite code w1 is 0.
    next_weight = np.where(below == INFINITE - 1, 0.0, np.exp(-STEP))
    share = -np.expm1((below - steps) * STEP) / (1 - next_weight)
    return (below + (uniform < share)).astype(np.uint16)


def from_fixed16(codes: np.ndarray) -> np.ndarray:
    """The numbers of codes, in float32 and exact.

    Example:
        >>> from_fixed16(np.array([0, 16384, 65535], dtype=np.uint16))
        array([-8.,  0., inf], dtype=float32)
    """
    x = codes.astype(np.float32) * np.float32(STEP) - np.float32(OFFSET)
    x[codes == INFINITE] = np.inf
    return x


def to_int8_at_random(rows: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in int8 with a scale each, such that the mean of `integers * scale` is the row.

    Args:
        rows: float32, of shape (tokens, d).
        uniform: Numbers drawn from [0, 1), of the same shape.

    Returns:
        The integers from -127 to 127, and the scales in float32: the largest absolute value of a
        row over 127.
    """
    scale = np.abs(rows).max(axis=1, initial=0.0).astype(np.float32) / np.float32(127)
    # A row of zeros, or of numbers too small to be told from them, is all 0.
    divisor = np.where(scale > 0, scale, np.float32(1))
    steps = rows.astype(np.float64) / divisor[:, None].astype(np.float64)
    below = np.floor(steps)
    integers = below + (uniform < steps - below)
    # A scale that was rounded down has its largest number at 127.00001.
    return np.clip(integers, -127, 127).astype(np.int8), scale
