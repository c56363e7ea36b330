"""Norm and rotary embedding on a CPU: the core's bits are the reference's, the reference's values those of F64."""

from __future__ import annotations

import itertools

import pytest
import torch

from m27quant.kernels import rms_norm as package
from m27quant.kernels import rotary
from m27quant.kernels.rms_norm import rms_norm
from m27quant.kernels.rotary import qk_norm_rope, rotate
from m27quant.runtime import layer
from tests.kernels.nvfp4 import num_threads  # noqa: F401  # a fixture
from tests.kernels.poison import poisoned  # noqa: F401  # a fixture
from tests.tolerance import NORM_F32, NORM_UNLIKE_TORCH

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.bfloat16, torch.float32]
EPS = 1e-6
SHAPES = [(5, 3072), (1, 1), (3, 4, 77), (0, 8), (2, 6144), (9, 15), (33,)]
HEADS = [
    (5, 6, 2, 16, 8),
    (1, 48, 8, 128, 64),
    (3, 2, 1, 10, 10),
    (4, 3, 3, 8, 0),
    (0, 2, 2, 8, 4),
    (2, 4, 2, 24, 10),
]
"""T, H, J, C, R."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "w_dtype"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.usefixtures("num_threads")
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * torch.randn(shape[:-1]).exp()[..., None]).to(dtype)
    w = torch.randn(shape[-1]).to(w_dtype)
    y = rms_norm(x, w, EPS)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert torch.equal(y, package.reference.rms_norm(x, w, EPS))
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    if dtype == torch.float32:
        assert ((y - exact * w.double()).abs() <= NORM_F32 * (exact * w.double()).abs()).all()
    else:  # rounded to BF16, multiplied, rounded again
        assert ((y - exact * w.double()).abs() <= 2**-7 * (exact * w.double()).abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_norm_of_small_and_large_rows(size: float, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 100) * size).to(dtype)
    y = rms_norm(x, torch.ones(100, dtype=dtype), EPS)
    assert torch.equal(y, package.reference.rms_norm(x, torch.ones(100, dtype=dtype), EPS))
    assert y.isfinite().all()
    assert (y == 0).all() or size == 1e-30, (
        "the mean of huge squares is infinite in F32: all is 0, as in torch"
    )


def test_a_nan_stays_in_its_row() -> None:
    x = torch.randn(3, 40)
    x[1, 39] = torch.nan
    y = rms_norm(x, torch.ones(40), EPS)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_norm_is_the_layers_but_for_the_order_of_its_sum() -> None:
    """torch sums the squares in F32; in BF16 that shows in one value among some hundred thousand."""
    x, w = torch.randn(400, 3072).bfloat16(), torch.randn(3072).bfloat16()
    y, expected = rms_norm(x, w, EPS), layer.rms_norm(x, w, EPS)
    assert float((y != expected).float().mean()) <= NORM_UNLIKE_TORCH
    steps = (y.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert int(steps.max()) <= 2


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("num_threads")
def test_rotation(heads: tuple[int, ...], dtype: torch.dtype) -> None:
    T, H, _, C, R = heads
    angles = torch.rand(T, 1, R) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    x = torch.randn(T, H, C).to(dtype)
    y = rotate(x, cos, sin)
    assert torch.equal(y, rotary.reference.rotate(x, cos, sin))
    assert torch.equal(y[..., R:], x[..., R:]), "the others pass"
    a, b = x[..., : R // 2].double(), x[..., R // 2 : R].double()
    c, s = cos.double(), sin.double()
    first = a * c[..., : R // 2] - b * s[..., : R // 2]
    second = b * c[..., R // 2 :] + a * s[..., R // 2 :]
    size = torch.hypot(a, b) * (2**-7 if dtype == torch.bfloat16 else 2**-22)
    assert ((y[..., : R // 2] - first).abs() <= size).all()
    assert ((y[..., R // 2 : R] - second).abs() <= size).all()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("num_threads")
def test_norm_and_rotation_together_are_one_after_the_other(
    heads: tuple[int, ...], dtype: torch.dtype
) -> None:
    T, H, J, C, R = heads
    qkv = torch.randn(T, (H + 2 * J) * C).to(dtype)
    q, k = qkv[:, : H * C], qkv[:, H * C : (H + J) * C]  # parts of one projection
    q_norm, k_norm = torch.randn(H * C).to(dtype), torch.randn(J * C).to(dtype)
    cos, sin = torch.randn(2, T, 1, R).to(dtype)
    found = qk_norm_rope(q, k, q_norm, k_norm, cos, sin, C, EPS)
    for y, x, norm, heads_of in ((found[0], q, q_norm, H), (found[1], k, k_norm, J)):
        assert torch.equal(y, rotate(rms_norm(x, norm, EPS).view(T, heads_of, C), cos, sin))
        for t in range(T):
            alone = rotate(
                rms_norm(x[t : t + 1], norm, EPS).view(1, heads_of, C), cos[t : t + 1], sin[t : t + 1]
            )
            assert torch.equal(alone[0], y[t])


def test_what_does_not_fit_is_refused() -> None:
    x, table = torch.zeros(2, 3, 8), torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match="norm weight"):
        rms_norm(x, torch.zeros(7), EPS)
    with pytest.raises(ValueError, match="float16"):
        rms_norm(x.half(), torch.zeros(8), EPS)
    with pytest.raises(ValueError, match="cos must be"):
        rotate(x, torch.zeros(2, 1, 5), table)
    with pytest.raises(ValueError, match="cos must be"):
        rotate(x, torch.zeros(2, 1, 10), table)
    with pytest.raises(ValueError, match="sin must be"):
        rotate(x, table, torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="heads are"):
        rotate(x.bfloat16(), table, table)
    with pytest.raises(ValueError, match="heads of 5"):
        qk_norm_rope(x.flatten(1), x.flatten(1), torch.zeros(24), torch.zeros(24), table, table, 5, EPS)
