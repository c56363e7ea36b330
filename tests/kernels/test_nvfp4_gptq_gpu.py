"""Error feedback in Triton: GPTQ's choices, one group's bytes in the interpreter, compiled ahead of time, CUDA."""

from __future__ import annotations

import re

import pytest
import torch

from m27quant.kernels import nvfp4_gptq, nvfp4_pack
from m27quant.kernels.nvfp4_gptq import reference
from tests.kernels import interpreter
from tests.kernels.packing import assert_same_bytes
from tests.kernels.test_nvfp4_gptq import assert_as_gptq_asks, gptq_oracle, hessian, weights

triton = pytest.importorskip("triton", reason="needs Triton, which this platform does not have")

CASES = ["one group", "two groups", "nonfinite"]


def check(case: str) -> None:
    """On CPU tensors: only Triton's interpreter can run this."""
    from m27quant.kernels.nvfp4_gptq import gpu

    columns = 16 if case == "one group" else 32
    x, H = weights(rows=10, columns=columns), hessian()[:columns, :columns].contiguous()
    factor, amax = nvfp4_gptq.factorize(H), nvfp4_pack.amax(x) * 0.5
    scale_2 = nvfp4_pack.reference.global_scale(amax)
    if case == "nonfinite":
        x[3, 20] = torch.inf
    found = []
    for pack in (gpu.pack, reference.pack):
        codes, scale = nvfp4_pack.buffers(x, None)
        assert pack(x, scale_2, factor, codes, scale) == (case != "nonfinite")
        found.append(nvfp4_pack.PackedNVFP4(codes, scale, scale_2))
    if case == "one group":
        assert_same_bytes(*found)
    if case == "two groups":
        assert_as_gptq_asks(x, found[0], gptq_oracle.damped(H, 0.01))
        energy = gpu.energies(x.float(), factor)
        torch.testing.assert_close(energy, reference.energies(x.float(), factor), rtol=1e-5, atol=0)


def test_in_the_interpreter() -> None:
    interpreter.run("tests.kernels.test_nvfp4_gptq_gpu", CASES)


@pytest.mark.parametrize("arch", [90, 100, 120])
def test_compiles_to_correctly_rounded_code(arch: int) -> None:
    """For Hopper and both Blackwells: true division, nothing fused, approximated or flushed."""
    from m27quant.kernels.nvfp4_gptq import gpu

    kernel, floats = (
        gpu.gptq_group_kernel,
        ("fed", "coupling", "channel", "weight_scale_2", "candidates", "error"),
    )
    types = {"weight": "*bf16", "order": "*i32", "codes": "*u8", "scales": "*u8", "nonfinite": "*i32"}
    types |= dict.fromkeys(floats, "*fp32")
    signature = {n: "constexpr" if n == "BN" else types.get(n, "i32") for n in kernel.arg_names}
    compiled = triton.compile(
        triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs={"BN": gpu.ROWS}),
        target=triton.backends.compiler.GPUTarget("cuda", arch, 32),
        options=gpu.OPTIONS,
    )
    ptx = compiled.asm["ptx"]
    assert f".target sm_{arch}a" in ptx
    assert not re.search(r"\bfma\b|\.ftz|\.approx|div\.full", ptx)
    assert "div.rn.f32" in ptx
    assert len(compiled.asm["cubin"]) > 1000


@pytest.mark.gpu
def test_on_cuda() -> None:
    x, H = weights(), hessian()
    factor = nvfp4_gptq.factorize(H.cuda())
    packed = nvfp4_gptq.pack(x.cuda(), amax=nvfp4_pack.amax(x).cuda(), factor=factor)
    packed = nvfp4_pack.PackedNVFP4(*(tensor.cpu() for tensor in packed))
    assert_as_gptq_asks(x, packed, gptq_oracle.damped(H, 0.01))
