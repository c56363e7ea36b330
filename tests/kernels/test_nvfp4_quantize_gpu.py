"""NVFP4 activations in Triton: the reference's bytes in Triton's interpreter and on CUDA, true divisions in the PTX."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from m27quant.kernels.nvfp4_quantize import quantize, reference
from tests.kernels import interpreter
from tests.kernels.packing import assert_same_bytes

triton = pytest.importorskip("triton", reason="needs Triton, which this platform does not have")

import triton.language as tl  # noqa: E402

from m27quant.kernels.nvfp4_quantize import gpu  # noqa: E402
from tests.kernels import aot  # noqa: E402

CHECKS = ("sizes", "scales", "special", "every_bf16", "rows_apart")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(case: str) -> None:
    with pytest.MonkeyPatch.context() as patches:
        interpreter.poison(patches)
        patches.setattr(gpu, "TILE", {"BT": 64, "BG": 32})  # the interpreter's time goes by programs
        globals()[f"check_{case}"](torch.device("cpu"))


def agree(x: Tensor, scale: float, device: torch.device) -> None:
    expected_codes, expected_scale = reference.quantize(x, torch.tensor(scale))
    for swizzled in (False, True):
        block_scale = reference.swizzle(expected_scale) if swizzled else expected_scale
        found = gpu.quantize(x.to(device), torch.tensor(scale, device=device), swizzled=swizzled)
        assert_same_bytes(tuple(t.cpu() for t in found), (expected_codes, block_scale))


def check_sizes(device: torch.device) -> None:
    for T, K in ((0, 16), (3, 0), (1, 16), (5, 48), (130, 80), (33, 272)):
        for dtype in DTYPES:
            agree((torch.randn(T, K) * torch.randn(T, 1).exp2()).to(dtype), 3e-3, device)


def check_scales(device: torch.device) -> None:
    x = torch.randn(9, 256) * torch.randn(9, 1).mul(30).exp2()
    for scale in (2.0**-126, 1e-30, 2.0**-20, 1.0, 2.0**100, 3.4e38):
        agree(x, scale, device)


def check_special(device: torch.device) -> None:
    """Ties, both zeros, numbers below the normal ones, Inf and NaN of both signs, overflow to Inf on the way."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x = torch.zeros(8, 64)
    x[0, :16] = torch.cat((ties, -ties))
    x[1, :16] = torch.cat((ties, -ties)) * 2.0**-140
    x[2, :4] = torch.tensor([torch.inf, -0.0, 1.0, -1.0])
    x[3, 16:20] = torch.tensor([-torch.inf, torch.nan, 1.0, -0.0])
    x[4, :3] = torch.tensor([-torch.nan, 5.0, -5.0])
    x[5, :2] = torch.tensor([3.4e38, -3.4e38])
    x[6] = -0.0
    x[7, 5] = 2.0**-149
    for scale in (1.0, 1 / 2688, 1e-38, 3e38):
        agree(x, scale, device)


def check_every_bf16(device: torch.device) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    x = bits[torch.randperm(65536)].view(torch.bfloat16).view(32, 2048)
    finite = torch.where(x.isfinite(), x, 1.0)
    agree(x, 1.0, device)
    for scale in (1e-3, 2.0**60):
        agree(finite, scale, device)


def check_rows_apart(device: torch.device) -> None:
    wide = torch.randn(4, 96).bfloat16()
    agree(wide[:, 16:64], 0.01, device)
    agree(torch.randn(64, 4).T, 0.01, device)


def test_activations_in_the_interpreter() -> None:
    interpreter.run("tests.kernels.test_nvfp4_quantize_gpu", CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_activations_on_cuda(name: str) -> None:
    with interpreter.hardware() as device:
        globals()[f"check_{name}"](device)


@triton.jit
def round_all_kernel(first, codes, HARDWARE: tl.constexpr, B: tl.constexpr):
    """Codes of the F32 numbers whose bits are first, first + 1, ..."""
    o = tl.program_id(0) * B + tl.arange(0, B)
    bits = first + o
    y = tl.reshape(bits.to(tl.float32, bitcast=True), (B // 2, 2))
    sign = tl.reshape((bits >> 28) & 8, (B // 2, 2))
    pairs = gpu.e2m1_pairs(y, sign, HARDWARE)
    tl.store(codes + tl.program_id(0) * (B // 2) + tl.arange(0, B // 2), pairs.to(tl.uint8))


@pytest.mark.gpu
def test_hardware_rounds_every_number_as_integers_do() -> None:
    """All 2**32 numbers; where the chip cannot, the integers against the reference, every 257th number."""
    device = torch.device("cuda")
    hardware = gpu._rounds_in_hardware(device)
    count = 1 << 28
    for part in range(16):
        first = part * count - (1 << 31)
        codes = []
        for switch in {False, hardware}:
            out = torch.empty(count // 2, dtype=torch.uint8, device=device)
            round_all_kernel[(count // 4096,)](first, out, HARDWARE=switch, B=4096)
            codes.append(out)
        assert torch.equal(codes[0], codes[-1])
        bits = torch.arange(first, first + count, 257, device=device)
        y = bits.to(torch.int32).view(torch.float32)
        place = bits - first
        found = (codes[0][place // 2] >> (4 * (place % 2)).to(torch.uint8)) & 15
        expected = reference.e2m1_codes(y.abs()) | (y.signbit().to(torch.uint8) << 3)
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_no_wait_for_the_device() -> None:
    """A CUDA graph can hold it."""
    x, scale = torch.randn(5, 64, device="cuda"), torch.tensor(0.01, device="cuda")
    quantize(x, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = quantize(x, scale)
    x.copy_(torch.randn(5, 64))
    graph.replay()
    assert_same_bytes(captured, quantize(x, scale))


@pytest.mark.parametrize("arch", [80, 90, 100, 120, 121])
def test_correctly_rounded_code(arch: int) -> None:
    """True division, nothing fused, approximated or flushed; E2M1 in hardware on Blackwell and only there."""
    with aot.launches(arch) as compiled:
        gpu.quantize(aot.meta(37, 3072), aot.meta(dtype=torch.float32), swizzled=True)
    compiled[0].check()
    ptx = compiled[0].ptx
    assert "div.rn.f32" in ptx
    assert not re.search(r"\bfma\b|\.ftz|\.approx|div\.full|\bcvt\.rn\.\w*\.?e4m3", ptx)
    assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == (arch >= 100)
