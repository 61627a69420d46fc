import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neo.losses import products
from neo.losses.products import add_transposed_times, times, times_transposed, wide

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (m, k, n): empty, small, and large enough for oneDNN
SHAPES = [(0, 5, 7), (3, 5, 0), (3, 5, 7), (256, 128, 512)]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES)


def factors(shape, dtype):
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, columns, generator=generator).to(dtype)
        for rows, columns in ((m, k), (n, k))
    )


def exact(a, b):
    return (a.double() @ b.double()).to(wide(a.dtype))


@each_dtype
@each_shape
def test_logits_are_the_exact_product_in_float32_and_never_rounded_to_the_dtype_of_the_model(
    dtype, shape
):
    a, b = factors(shape, dtype)
    product = times_transposed(a, b)
    assert product.dtype == wide(dtype)
    torch.testing.assert_close(product, exact(a, b.T), rtol=1e-5, atol=1e-4)


@each_dtype
@each_shape
def test_a_wide_gradient_times_a_weight_is_the_exact_product(dtype, shape):
    a, b = factors(shape, dtype)
    gradient = exact(a, b.T)
    product = times(gradient, b)
    assert product.dtype == wide(dtype)
    torch.testing.assert_close(product, exact(gradient, b), rtol=1e-5, atol=1e-3)


@each_dtype
@each_shape
def test_the_gradient_of_a_weight_is_added_to_what_is_there(dtype, shape):
    a, b = factors(shape, dtype)
    gradient = exact(a, b.T)
    total = torch.ones(len(b), a.shape[1], dtype=wide(dtype))
    add_transposed_times(total, gradient, a)
    torch.testing.assert_close(total, 1 + exact(gradient.T, a), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_how_much_of_a_weight_is_widened_at_a_time_changes_nothing(rows, monkeypatch):
    a, b = factors((4, 6, 11), torch.bfloat16)
    gradient = exact(a, b.T)
    expected = times_transposed(a, b), times(gradient, b)
    monkeypatch.setattr(products, "WIDENED_ELEMENTS", rows * 6)
    torch.testing.assert_close((times_transposed(a, b), times(gradient, b)), expected)


class Recorder(TorchDispatchMode):
    """Remembers the names of the operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def used(a, b):
    with Recorder() as recorder:
        times_transposed(a, b)
        times(torch.zeros(len(a), len(b), dtype=a.dtype), b)
    return ["onednn" if "mkldnn" in n else "mm" for n in recorder.names if "mm" in n or "mkl" in n]


def test_onednn_multiplies_large_float32_factors_where_it_is_there(monkeypatch):
    large = list(factors((256, 128, 512), torch.float32))
    assert used(*large) == ["onednn", "onednn"]
    assert used(*factors((4, 8, 16), torch.float32)) == ["mm", "mm"]
    assert used(*factors((256, 128, 512), torch.float64)) == ["mm", "mm"]
    monkeypatch.setattr(products, "_ONEDNN", None)
    assert used(*large) == ["mm", "mm"]
