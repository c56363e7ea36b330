"""Norm and rotary embedding in Triton: the reference's bits in Triton's interpreter and on CUDA."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from m27quant.kernels.rms_norm import reference as norm_reference
from m27quant.kernels.rotary import reference as rotary_reference
from tests.kernels import interpreter

pytest.importorskip("triton", reason="needs Triton, which this platform does not have")

from m27quant.kernels.rms_norm import gpu as norm
from m27quant.kernels.rotary import gpu as rotary
from tests.kernels import aot

CHECKS = ("norm", "norm_special", "rotate", "norm_and_rotate")
DTYPES = (torch.float32, torch.bfloat16)


def check(case: str) -> None:
    with pytest.MonkeyPatch.context() as patches:
        interpreter.poison(patches)
        globals()[f"check_{case}"](torch.device("cpu"))


def same(found: Tensor, expected: Tensor) -> None:
    """Equal bits, but for which NaN it is."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found = found.cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    integers = torch.int16 if found.dtype == torch.bfloat16 else torch.int32
    numbers = ~expected.isnan()
    assert torch.equal(found[numbers].view(integers), expected[numbers].view(integers))


def judge_norm(x: Tensor, weight: Tensor, eps: float, device: torch.device) -> None:
    found = norm.rms_norm(x.to(device), weight.to(device), eps)
    same(found, norm_reference.rms_norm(x, weight, eps))


def check_norm(device: torch.device) -> None:
    for shape in ((3, 2, 1), (4, 7), (2, 3, 96), (0, 5), (3, 3072)):
        for dtype in DTYPES:
            for weight_dtype in DTYPES:
                x = torch.randn(shape) * torch.randn(*shape[:-1], 1).mul(10).exp2()
                weight = torch.randn(shape[-1]).to(weight_dtype)
                judge_norm(x.to(dtype), weight, 1e-6, device)
    wide = torch.randn(5, 64).bfloat16()
    judge_norm(wide[:, 7:40], torch.randn(33).bfloat16(), 1e-5, device)
    judge_norm(wide.T, torch.randn(5).bfloat16(), 1e-5, device)


def check_norm_special(device: torch.device) -> None:
    for dtype in DTYPES:
        x = torch.randn(5, 48)
        x[0] = 0
        x[1, 3] = torch.inf
        x[2, 4] = torch.nan
        x[3] *= 2.0**-130
        x[4] *= 2.0**100
        judge_norm(x.to(dtype), torch.randn(48).to(dtype), 0.0, device)
        judge_norm(x.to(dtype), torch.randn(48).to(dtype), 1e-6, device)


def tables(T: int, R: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.randn(T, 1, R) * 7
    return angles.cos().to(dtype), angles.sin().to(dtype)


SHAPES = ((6, 1, 32, 16), (5, 3, 24, 24), (48, 8, 128, 64), (3, 3, 10, 0), (2, 1, 6, 2))


def check_rotate(device: torch.device) -> None:
    for H, _, C, R in SHAPES:
        for dtype in DTYPES:
            x = torch.randn(3, H * C + 5).to(dtype)[:, : H * C].view(3, H, C)
            cos, sin = tables(3, R, dtype)
            found = rotary.rotate(x.to(device), cos.to(device), sin.to(device))
            same(found, rotary_reference.rotate(x, cos, sin))


def check_norm_and_rotate(device: torch.device) -> None:
    for H, J, C, R in SHAPES:
        for dtype in DTYPES:
            T = 0 if (H, C) == (2, 6) else 2
            projected = torch.randn(T, (H + J) * C + 3).to(
                dtype
            )  # q and k side by side, as one product gives them
            q, k = projected[:, : H * C], projected[:, H * C : (H + J) * C]
            norms = torch.randn(H * C).to(dtype), torch.randn(J * C).to(dtype)
            inputs = (q, k, *norms, *tables(T, R, dtype))
            found = rotary.qk_norm_rope(*(t.to(device) for t in inputs), C, 1e-6)
            for a, b in zip(found, rotary_reference.qk_norm_rope(*inputs, C, 1e-6), strict=True):
                same(a, b)


def test_norms_in_the_interpreter() -> None:
    interpreter.run("tests.kernels.test_norm_gpu", CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_norms_on_cuda(name: str) -> None:
    with interpreter.hardware() as device:
        globals()[f"check_{name}"](device)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_correctly_rounded_code(arch: int) -> None:
    with aot.launches(arch) as compiled:
        norm.rms_norm(aot.meta(37, 3072), aot.meta(3072), 1e-6)
        rotary.qk_norm_rope(
            aot.meta(7, 6144), aot.meta(7, 1024), aot.meta(6144), aot.meta(1024),
            aot.meta(7, 1, 64), aot.meta(7, 1, 64), 128, 1e-6,
        )  # fmt: skip
    assert [kernel.name for kernel in compiled] == ["rms_norm_kernel", "norm_rope_kernel"]
    for kernel in compiled:
        kernel.check()
        assert kernel.count(r"sqrt\.rn\.f32")
        assert not re.search(r"\bfma\b|\.ftz|\.approx|div\.full", kernel.ptx)
