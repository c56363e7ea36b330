"""The Triton search for block scales: the reference's bytes in the interpreter and on CUDA, compiled ahead of time."""

from __future__ import annotations

import re

import pytest
import torch

from m27quant.kernels import nvfp4_pack
from m27quant.kernels.nvfp4_pack import reference, scale_search
from tests.kernels import interpreter
from tests.kernels.packing import assert_same_bytes
from tests.kernels.scale_cases import Case, cases, extreme_cases

triton = pytest.importorskip("triton", reason="needs Triton, which this platform does not have")

CASES = ["fp8", "weighted", "ends", "nonfinite"]


def check(case: str) -> None:
    """Kernel against reference on CPU tensors: only Triton's interpreter can run this."""
    from m27quant.kernels.nvfp4_pack import gpu

    bf16, _, _, fp8, *_ = cases("student", 128, 128)
    weight, scale_inv, amax, block = bf16 if case == "weighted" else fp8
    if case == "ends":
        weight, scale_inv, amax, block = list(extreme_cases())[3]
        weight = weight[:4].contiguous()
    rows = slice(0, 16)  # one program
    weight = weight[rows]
    channel = torch.rand(weight.shape[1]) if case == "weighted" else None
    if case == "nonfinite":
        weight = weight.clone()
        weight.view(torch.uint8)[3, 5] = 0x7F
    found = []
    for search in (gpu.pack_least_error, scale_search.pack):
        codes, scale = nvfp4_pack.buffers(weight, None)
        scale_2 = reference.global_scale(amax)
        finite = search(weight, scale_inv, scale_2, block, channel, codes, scale)
        assert finite == (case != "nonfinite")
        found.append((codes, scale))
    if case != "nonfinite":
        assert_same_bytes(*found)


def test_in_the_interpreter() -> None:
    interpreter.run("tests.kernels.test_scale_search_gpu", CASES)


@pytest.mark.parametrize("arch", [90, 100, 120])
@pytest.mark.parametrize(("fp8", "weighted"), [(True, False), (False, True)], ids=["fp8", "bf16 weighted"])
def test_compiles_to_correctly_rounded_code(fp8: bool, weighted: bool, arch: int) -> None:
    """For Hopper and both Blackwells: true division, nothing fused, approximated or flushed."""
    from m27quant.kernels.nvfp4_pack import gpu

    kernel = gpu.nvfp4_search_kernel
    types = {"weight": "*u8", "scale_inv": "*fp32"} if fp8 else {"weight": "*i16", "scale_inv": "*i16"}
    types |= {"weight_scale_2": "*fp32", "candidates": "*fp32", "channel": "*fp32"}
    types |= {"codes": "*u8", "scales": "*u8", "nonfinite": "*i32"}
    constants = {"FP8": fp8, "WEIGHTED": weighted, **gpu.TILE}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    compiled = triton.compile(
        triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=triton.backends.compiler.GPUTarget("cuda", arch, 32),
        options=gpu.OPTIONS,
    )
    ptx = compiled.asm["ptx"]
    assert f".target sm_{arch}a" in ptx
    assert not re.search(r"\bfma\b|\.ftz|\.approx|div\.full|\bcvt\.rn\.\w*e4m3", ptx)
    assert "div.rn.f32" in ptx
    assert "mul.f64" in ptx or "mul.rn.f64" in ptx
    assert len(compiled.asm["cubin"]) > 1000


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "student", "on the grid", "wide range"])
def test_bytes_on_cuda(kind: str) -> None:
    chosen: list[Case] = [*cases(kind, 256, 512)]
    for weight, scale_inv, amax, block in chosen:
        for channel in (None, torch.rand(512)):
            expected = nvfp4_pack.pack(
                weight, scale_inv, amax=amax, block=block, scales="mse", channel_weight=channel
            )
            found = nvfp4_pack.pack(
                weight.cuda(),
                None if scale_inv is None else scale_inv.cuda(),
                amax=amax.cuda(),
                block=block,
                scales="mse",
                channel_weight=None if channel is None else channel.cuda(),
            )
            assert_same_bytes(tuple(t.cpu() for t in found), expected)
