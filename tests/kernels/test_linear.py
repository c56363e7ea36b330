"""Products with BF16 and F32 weights on a CPU: against F64, and one row's bits in every batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from m27quant.kernels.linear import linear
from tests.kernels.nvfp4 import (
    implementation,  # noqa: F401  # a fixture
    num_threads,  # noqa: F401  # a fixture
)
from tests.kernels.poison import poisoned  # noqa: F401  # a fixture
from tests.tolerance import FLUSHED, product_bound

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.bfloat16, torch.float32]
PAIRS = list(itertools.product(DTYPES, DTYPES))
SHAPES = [
    (1, 1, 1),
    (5, 7, 31),
    (4, 6, 32),
    (13, 19, 77),
    (70, 13, 1100),
    (66, 12, 64),
    (3, 600, 40),
    (1, 97, 3072),
]


def judge(x: Tensor, w: Tensor, *, invariant: bool) -> Tensor:
    y = linear(x, w, invariant=invariant)
    expected = x.double() @ w.double().T
    assert (y.shape, y.dtype) == (expected.shape, x.dtype)
    bound = product_bound(x.double(), w.double(), expected, x.dtype)
    if x.dtype == w.dtype == torch.bfloat16:
        bound += x.shape[1] * FLUSHED
    excess = (y.double() - expected).abs() - bound
    assert not (excess > 0).any(), f"missed by {float(excess.max()):g}"
    assert y.isfinite().all()
    return y


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("x_dtype", "w_dtype"), PAIRS)
def test_products(shape: tuple[int, int, int], x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    T, N, K = shape
    x, w = torch.randn(T, K).to(x_dtype), torch.randn(N, K).to(w_dtype)
    judge(x, w, invariant=False)
    y = judge(x, w, invariant=True)
    for t in {0, T // 2, T - 1}:
        assert torch.equal(linear(x[t : t + 1], w, invariant=True)[0], y[t]), "alone as among others"
    order = torch.randperm(T)
    assert torch.equal(linear(x[order], w, invariant=True), y[order])
    assert torch.equal(linear(x, w[N // 3 :], invariant=True), y[:, N // 3 :]), "a part of the outputs"


@pytest.mark.parametrize(("x_dtype", "w_dtype"), PAIRS)
def test_threads_do_not_show(x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    x, w = torch.randn(9, 640).to(x_dtype), torch.randn(700, 640).to(w_dtype)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(linear(x, w, invariant=True))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("x_dtype", "w_dtype"), PAIRS)
def test_rows_that_do_not_lie_together(x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    """Slices of wider matrices, surrounded by NaN, and transposed ones."""
    x, w = torch.randn(5, 50).to(x_dtype), torch.randn(9, 50).to(w_dtype)
    y = linear(x, w, invariant=True)
    wide_x, wide_w = (
        torch.full((5, 70), torch.nan, dtype=x_dtype),
        torch.full((9, 64), torch.nan, dtype=w_dtype),
    )
    wide_x[:, 3:53], wide_w[:, 10:60] = x, w
    assert torch.equal(linear(wide_x[:, 3:53], wide_w[:, 10:60], invariant=True), y)
    assert torch.equal(linear(x.T.contiguous().T, w.T.contiguous().T, invariant=True), y)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("x_dtype", "w_dtype"), PAIRS)
@pytest.mark.parametrize("size", [0.0, 1e-18, 1e18])
def test_small_and_large_numbers(size: float, x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    judge((torch.randn(3, 100) * size).to(x_dtype), (torch.randn(5, 100) * size).to(w_dtype), invariant=True)


@pytest.mark.usefixtures("implementation")
def test_a_nan_stays_in_its_row_and_an_overflow_is_infinite() -> None:
    x, w = torch.ones(6, 33), torch.ones(7, 33)
    x[2, 32], x[4, 5] = torch.nan, torch.inf
    y = linear(x, w, invariant=True)
    assert y[2].isnan().all()
    assert (y[4] == torch.inf).all()
    assert (y[[0, 1, 3, 5]] == 33).all()
    assert (linear(torch.full((1, 4), 3e38), torch.ones(2, 4), invariant=True) == torch.inf).all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 3), (2, 3, 0)])
def test_nothing_to_multiply(shape: tuple[int, int, int]) -> None:
    T, N, K = shape
    y = linear(torch.ones(T, K), torch.ones(N, K), invariant=True)
    assert torch.equal(y, torch.zeros(T, N))


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), "differ in their last side"),
        (torch.ones(3), torch.ones(4, 3), "takes matrices"),
        (torch.ones(2, 3).half(), torch.ones(4, 3), "float16"),
        (torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int8), "the weight is torch.int8"),
        (torch.ones(2, 3), torch.ones(4, 3, device="meta"), "move one"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, w: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(x, w)
