"""FP8 block dequantization: bit for bit `(weight.float() * scale).to(dtype)`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m27quant.errors import CheckpointError
from m27quant.kernels import dispatch, fp8_dequant, native
from tests.kernels import packing
from tests.kernels.packing import FP8, assert_same_bytes

CPU_BACKENDS = ["reference"] + (["cpu-native"] if native.load().error is None else [])
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert dispatch.choose("fp8_dequant", "cpu").backend == request.param
    return request.param


def formula(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
    N, K = weight.shape
    scale = scale_inv.repeat_interleave(block[0], 0)[:N].repeat_interleave(block[1], 1)[:, :K]
    return (weight.float() * scale).to(dtype)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, but any NaN for a NaN."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_same_bytes((actual.nan_to_num(0.5),), (expected.nan_to_num(0.5),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 130), (128, 128), (129, 127), (200, 300), (384, 640)])
def test_edge_blocks(backend: str, dtype: torch.dtype, N: int, K: int) -> None:
    weight, scale_inv = packing.random_fp8(N, K)
    assert_equal(
        fp8_dequant.dequantize(weight, scale_inv, dtype), formula(weight, scale_inv, dtype, (128, 128))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_under_every_kind_of_scale(backend: str, dtype: torch.dtype) -> None:
    """All 256 codes, NaN included, times scales that underflow, round, tie, overflow, are negative or no number."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).repeat(64, 1)
    scales = [*packing.block_scales(), -0.0, -1.5, 3e38, 1e38, math.inf, -math.inf, math.nan, 2**-7 + 2**-15]
    scale_inv = torch.tensor(scales)[: len(codes), None]
    codes = codes[: len(scale_inv)]
    value = fp8_dequant.dequantize(codes, scale_inv, dtype, block=(1, 256))
    assert_equal(value, formula(codes, scale_inv, dtype, (1, 256)))


@given(
    N=st.integers(1, 70),
    K=st.integers(1, 70),
    rows=st.integers(1, 80),
    columns=st.integers(1, 80),
    seed=st.integers(0),
)
@settings(max_examples=50, deadline=None)
def test_blocks_of_any_size(N: int, K: int, rows: int, columns: int, seed: int) -> None:
    block = (rows, columns)
    weight = packing.random_codes(N, K, seed % 2**32)
    scale_inv = torch.rand(
        packing.scale_grid(N, K, block), generator=torch.Generator().manual_seed(seed % 2**32)
    )
    for dtype in DTYPES:
        value = fp8_dequant.dequantize(weight, scale_inv, dtype, block)
        assert_equal(value, formula(weight, scale_inv, dtype, block))


def test_out_and_threads(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element of a poisoned buffer is written, whatever the number of threads; strides do not matter."""
    monkeypatch.setattr(native, "_BYTES_PER_THREAD", 1)
    weight, scale_inv = packing.random_fp8(141, 176)
    expected = formula(weight, scale_inv, torch.bfloat16, (128, 128))
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 8):
            torch.set_num_threads(num_threads)
            out = torch.full((141, 176), math.nan, dtype=torch.bfloat16)
            assert fp8_dequant.dequantize(weight, scale_inv, out=out) is out
            assert_equal(out, expected)
    finally:
        torch.set_num_threads(before)
    strided = fp8_dequant.dequantize(weight.T.contiguous().T, scale_inv.T.contiguous().T)
    assert_equal(strided, expected)


@pytest.mark.parametrize(
    ("weight", "scale_inv", "block", "message"),
    [
        (torch.zeros(4, 4), torch.ones(1, 1), (128, 128), "weight is torch.float32"),
        (torch.zeros(4, 4).to(FP8), torch.ones(1, 1).half(), (128, 128), "weight_scale_inv is torch.float16"),
        (torch.zeros(4).to(FP8), torch.ones(1, 1), (128, 128), r"shape \[4\]"),
        (torch.zeros(0, 4).to(FP8), torch.ones(1, 1), (128, 128), r"shape \[0, 4\]"),
        (torch.zeros(4, 4).to(FP8), torch.ones(4, 1), (128, 128), r"needs \[1, 1\]"),
        (torch.zeros(4, 4).to(FP8), torch.ones(1), (4, 4), r"needs \[1, 1\]"),
        (torch.zeros(4, 4).to(FP8), torch.ones(1, 1), (0, 4), "blocks of 0x4"),
    ],
)
def test_what_does_not_belong_together(
    weight: Tensor, scale_inv: Tensor, block: tuple[int, int], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        fp8_dequant.dequantize(weight, scale_inv, block=block)


def test_slips_of_the_caller() -> None:
    weight, scale_inv = packing.random_fp8(4, 4)
    with pytest.raises(ValueError, match=r"cannot dequantize to torch\.int8"):
        fp8_dequant.dequantize(weight, scale_inv, torch.int8)
    for out in (torch.empty(4, 5), torch.empty(4, 4).bfloat16(), torch.empty(4, 8)[:, ::2]):
        with pytest.raises(ValueError, match=r"out must be a contiguous torch\.float32"):
            fp8_dequant.dequantize(weight, scale_inv, torch.float32, out=out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda(dtype: torch.dtype) -> None:
    weight, scale_inv = packing.random_fp8(300, 640)
    value = fp8_dequant.dequantize(weight.cuda(), scale_inv.cuda(), dtype)
    assert_equal(value.cpu(), formula(weight, scale_inv, dtype, (128, 128)))
