"""The Triton kernels: equal to the reference in Triton's interpreter, compiled ahead of time, run on CUDA."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from m27quant.errors import CheckpointError
from m27quant.kernels import dispatch, nvfp4_pack
from m27quant.kernels.nvfp4_pack import reference
from tests.kernels import packing
from tests.kernels.packing import assert_same_bytes

triton = pytest.importorskip("triton", reason="needs Triton, which this platform does not have")

CASES = ["odd sizes", "ties", "every code", "wide scales", "other blocks", "bf16", "dead", "nonfinite"]


def check(case: str) -> None:
    """Kernel against reference on CPU tensors: only Triton's interpreter can run this."""
    from m27quant.kernels.nvfp4_pack import gpu

    block = (128, 128)
    weight, scale_inv = packing.random_fp8(37, 176)
    if case == "every code":
        weight = packing.every_code_under_every_maximum()
        block = tuple(weight.shape)
        scale_inv = torch.tensor([[3.1e-4]])
    elif case == "wide scales":
        weight = packing.random_codes(256, 384)
        scale_inv = torch.tensor([[2.0**-120, 2.0**-123, 2.0**-133], [2.0**-137, 2.0**-139, 0.0]])
    elif case == "other blocks":
        block = (5, 24)
        weight, scale_inv = packing.random_fp8(37, 80, block=block)
    elif case == "bf16":
        weight, scale_inv = (torch.randn(37, 176) * torch.randn(37, 1).exp2()).bfloat16(), None
    elif case == "ties":  # under weight_scale_2 = 1; the last group makes 2688 the amax
        ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
        row = [*ties, *(-t for t in ties), 6.0, -0.0, 2688.0, -(2.0**-133), *[0.0] * 14]
        weight, scale_inv = torch.tensor([row], dtype=torch.bfloat16), None
    elif case == "dead":
        scale_inv = torch.zeros_like(scale_inv)
    elif case == "nonfinite":
        for row, column, code in ((0, 0, 0x7F), (36, 175, 0xFF)):
            broken = weight.clone()
            broken.view(torch.uint8)[row, column] = code
            assert gpu.amax(broken, scale_inv, block).isnan()
            assert not _pack(gpu, broken, scale_inv, torch.tensor(1.0), block)[0]
        assert gpu.amax(
            weight, scale_inv * 1e40, block
        ).isinf()  # finite scales of which some products overflow
        assert not _pack(gpu, weight, scale_inv * 1e40, torch.tensor(1.0), block)[0]
    amax = gpu.amax(weight, scale_inv, block)
    assert torch.equal(amax, reference.amax(weight, scale_inv, block))
    for factor in (1.0, 1.7, 3e-3, 2.0**14):
        scale_2 = reference.global_scale(amax * factor)
        finite, *buffers = _pack(gpu, weight, scale_inv, scale_2, block)
        expected_finite, *expected = _pack(reference, weight, scale_inv, scale_2, block)
        assert finite == expected_finite == True  # noqa: E712  (both are bool, and so compared)
        assert_same_bytes(tuple(buffers), tuple(expected))


def _pack(
    module: Any, weight: torch.Tensor, scale_inv: Any, scale_2: torch.Tensor, block: tuple[int, int]
) -> Any:
    N, K = weight.shape
    codes = torch.full((N, K // 2), 0xA5, dtype=torch.uint8)
    scale = torch.full((N, K // 16), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return module.pack(weight, scale_inv, scale_2, block, codes, scale), codes, scale


def test_kernels_in_the_interpreter(repository: Path) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(repository), *sys.path]),
    }
    script = (
        "import sys; from tests.kernels.test_nvfp4_pack_gpu import check; [check(c) for c in sys.argv[1:]]"
    )
    command = [sys.executable, "-c", script, *CASES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("arch", [90, 100, 120])
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("name", ["nvfp4_amax_kernel", "nvfp4_pack_kernel"])
def test_kernels_compile_to_correctly_rounded_code(name: str, fp8: bool, arch: int) -> None:
    """For Hopper and both Blackwells: true division, nothing fused, approximated or flushed, nothing spilled."""
    from m27quant.kernels.nvfp4_pack import gpu

    kernel = getattr(gpu, name)
    types = {"weight": "*u8", "scale_inv": "*fp32"} if fp8 else {"weight": "*i16", "scale_inv": "*i16"}
    types |= {"most": "*i32", "weight_scale_2": "*fp32", "codes": "*u8", "scales": "*u8", "nonfinite": "*i32"}
    constants = {"FP8": fp8, **gpu.TILE}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    compiled = triton.compile(
        triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=triton.backends.compiler.GPUTarget("cuda", arch, 32),
        options=gpu.OPTIONS,
    )
    ptx = compiled.asm["ptx"]
    assert f".target sm_{arch}a" in ptx
    assert not re.search(r"\bfma\b|\.ftz|\.approx|div\.full|\bcvt\.rn\.\w*e4m3", ptx)
    assert ("div.rn.f32" in ptx) == (name == "nvfp4_pack_kernel")
    assert len(compiled.asm["cubin"]) > 1000


def test_choice_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.choose("nvfp4_pack", "cuda:0") == ("triton", f"Triton {triton.__version__}")
    monkeypatch.setitem(sys.modules, "triton", None)
    choice = dispatch.choose("nvfp4_pack", "cuda:0")
    assert (choice.backend, choice.reason[:26]) == ("reference", "Triton cannot be imported:")


@pytest.mark.gpu
@pytest.mark.parametrize("partner", [1.0, 1.37, 5e-3, 2.0**12])
def test_bytes_on_cuda(partner: float) -> None:
    weight = packing.every_code_under_every_maximum()
    block = tuple(weight.shape)
    cases = [(weight, torch.tensor([[scale]]), block) for scale in packing.block_scales()]
    cases += [(*packing.random_fp8(N, K), packing.BLOCK) for N, K in ((1, 16), (129, 112), (1536, 3072))]
    cases += [((torch.randn(200, 512) * 0.02).bfloat16(), None, packing.BLOCK)]
    for weight, scale_inv, block in cases:
        scale_cuda = None if scale_inv is None else scale_inv.cuda()
        amax = nvfp4_pack.amax(weight.cuda(), scale_cuda, block=block)
        assert torch.equal(amax.cpu(), nvfp4_pack.amax(weight, scale_inv, block=block))
        amax = amax * partner
        if 2.0**-133 <= amax < float("inf"):
            packed = nvfp4_pack.pack(weight.cuda(), scale_cuda, amax=amax, block=block)
            expected = nvfp4_pack.pack(weight, scale_inv, amax=amax.cpu(), block=block)
            assert_same_bytes(tuple(t.cpu() for t in packed), expected)
            error = nvfp4_pack.squared_error(weight.cuda(), scale_cuda, packed, block=block)
            assert error == pytest.approx(nvfp4_pack.squared_error(weight, scale_inv, expected, block=block))


@pytest.mark.gpu
def test_nan_is_refused_on_cuda() -> None:
    weight, scale_inv = packing.random_fp8(300, 160)
    weight.view(torch.uint8)[130, 77] = 0x7F
    with pytest.raises(CheckpointError, match="first at row 130, column 77"):
        nvfp4_pack.pack(weight.cuda(), scale_inv.cuda(), amax=torch.tensor(1.0))
