"""Matrix products with float32 results, by the fastest way that the device offers.

Logits rounded to bfloat16 are off by up to 0.4 %, which at a logit of 20 is more than most
divergences are worth; so every product here keeps the accumulator's float32 (float64 for float64).
"""

import torch
from jaxtyping import Float
from torch import Tensor

# oneDNN multiplies float32 a third faster than MKL does on the CPUs tried, and torch's own products
# use MKL. The operator is the one that torch.compile emits; where it is missing, torch.mm serves.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# Fewer multiplications than these take less time than oneDNN's set-up.
MIN_MULTIPLICATIONS = 2**23
# Elements of a half-precision weight that are widened at a time on a CPU.
WIDENED_ELEMENTS = 2**22


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and logits: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of a product's factors: autocast's where it is on, else that of hidden states."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def times_transposed(a: Float[Tensor, "m k"], b: Float[Tensor, "n k"]) -> Float[Tensor, "m n"]:
    """`a @ b.T` in float32 or float64; without gradient."""
    if by_onednn(a, b):
        assert _ONEDNN is not None
        return _ONEDNN(a, b, None, "none", [], "")
    if a.is_cuda and a.dtype == b.dtype and a.dtype.itemsize == 2:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    if a.dtype == b.dtype == wide(a.dtype):
        return a @ b.T
    # No product of halves with a float32 result here: widen the second factor piece by piece.
    a = a.to(wide(a.dtype))
    rows = max(1, WIDENED_ELEMENTS // b.shape[1])
    out = a.new_empty(len(a), len(b))
    for start in range(0, len(b), rows):
        piece = slice(start, start + rows)
        out[:, piece] = times_transposed(a, b[piece].to(a.dtype))
    return out


def times(a: Float[Tensor, "m n"], b: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
    """`a @ b` in float32 or float64 for a wide `a`; without gradient.

    On a GPU `a` is rounded to the dtype of `b` first, as in every backward pass in half precision.
    """
    if by_onednn(a, b):
        assert _ONEDNN is not None
        return _ONEDNN(a, b.T, None, "none", [], "")
    if a.is_cuda and b.dtype.itemsize == 2:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    if a.dtype == b.dtype:
        return a @ b
    rows = max(1, WIDENED_ELEMENTS // b.shape[1])
    out = a.new_zeros(len(a), b.shape[1])
    for start in range(0, len(b), rows):
        piece = slice(start, start + rows)
        out += times(a[:, piece], b[piece].to(a.dtype))
    return out


def exact_times(a: Float[Tensor, "m n"], b: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
    """As `times`, but no digit of `a` is lost that float32 has, whatever the dtype of `b`."""
    if not (a.is_cuda and b.dtype.itemsize == 2 and a.dtype == torch.float32):
        return times(a, b)
    if b.dtype != torch.bfloat16:
        return a @ b.float()
    # A GPU multiplies halves far faster than floats, and two bfloat16 have 16 digits of a float32's
    # 24; what is lost is a 2^-17th of the sum of sizes, once, and not of a difference.
    high = a.to(torch.bfloat16)
    total = torch.mm(high, b, out_dtype=torch.float32)
    return total.add_(torch.mm((a - high).to(torch.bfloat16), b, out_dtype=torch.float32))


def by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is there, takes both factors as they are, and is worth its set-up."""
    return (
        _ONEDNN is not None
        and a.device.type == b.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.shape[:-1].numel() * b.numel() >= MIN_MULTIPLICATIONS
    )


def add_transposed_times(
    total: Float[Tensor, "n k"], a: Float[Tensor, "m n"], b: Float[Tensor, "m k"]
) -> None:
    """Adds `a.T @ b` to `total`, which is in float32 or float64; without gradient."""
    if a.is_cuda and b.dtype.itemsize == 2:
        total += torch.mm(a.to(b.dtype).T, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.T, b.to(total.dtype))
