"""The harness sees what it is there to see: the right instructions, and each fault."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton, which this platform does not have")

import triton.language as tl  # noqa: E402

from m27quant.kernels import chip  # noqa: E402
from tests.kernels import aot  # noqa: E402

OPTIONS = {"num_stages": 3, "enable_fp_fusion": False}


@triton.jit
def scaled_product(a, sa, b, sb, c, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    o_m, o_n, o_k, o_g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK // 2), tl.arange(0, BK // 16)
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BK):
        b_a = tl.load(a + o_m[:, None] * (K // 2) + o_k[None, :] + k // 2)
        b_b = tl.load(b + o_n[None, :] * (K // 2) + o_k[:, None] + k // 2)
        b_sa = tl.load(sa + o_m[:, None] * (K // 16) + o_g[None, :] + k // 16)
        b_sb = tl.load(sb + o_n[:, None] * (K // 16) + o_g[None, :] + k // 16)
        acc = tl.dot_scaled(b_a, b_sa, "e2m1", b_b, b_sb, "e2m1", acc)
    tl.store(c + o_m[:, None] * N + o_n[None, :], acc)


def compile_scaled_product(arch: int, M: int, N: int, BK: int) -> aot.Compiled:
    codes, scales = aot.meta(128, 256, dtype=torch.uint8), aot.meta(128, 32, dtype=torch.float8_e4m3fn)
    with aot.launches(arch) as compiled:
        scaled_product[(1,)](
            codes, scales, codes, scales, aot.meta(M, N, dtype=torch.float32), 512,
            M=M, N=N, BK=BK, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return compiled[0]


@pytest.mark.parametrize("arch", [100, 120])
def test_fp4_instruction(arch: int) -> None:
    compiled = compile_scaled_product(arch, 128, 64, 128)
    compiled.check()
    assert compiled.has_fp4
    assert not compiled.has_wgmma
    assert 0 < compiled.registers <= 255
    assert compiled.inner_loop()


def test_trap_and_tensor_memory() -> None:
    """Triton compiles a tile that tensor memory cannot hold to a trap, and says nothing."""
    faults = compile_scaled_product(100, 256, 256, 128).faults()
    assert any("its body is a trap" in fault or "columns of tensor memory" in fault for fault in faults)


def test_shared_memory_and_spills() -> None:
    compiled = compile_scaled_product(120, 128, 256, 256)
    assert compiled.spills
    assert [fault for fault in compiled.faults() if "registers are spilled" in fault]
    compiled.shared = 102400
    assert [fault for fault in compiled.faults() if "the chip has 101376" in fault]


def test_alignment_is_the_launch_s_own() -> None:
    """A pointer or size that 16 does not divide compiles to another kernel, as it would on the chip."""
    kernels = []
    for K in (512, 504):
        with aot.launches(90) as compiled:
            copy[(1,)](aot.meta(K), aot.meta(K), K, B=512, num_warps=4, **OPTIONS)
        kernels += compiled
    assert kernels[0].count(r"ld\.global.*\.v2\.")
    assert not kernels[1].count(r"ld\.global.*\.v2\.")


@triton.jit
def copy(x, y, n, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(y + o, tl.load(x + o, mask=o < n), mask=o < n)


@pytest.mark.parametrize(
    ("arch", "version", "reason"),
    [
        (90, (3, 9), "sm_90a has no FP4"),
        (100, (3, 6), None),
        (110, (3, 6), "cannot compile NVFP4 for sm_110a, 3.7 can"),
        (120, (3, 6), None),
        (121, (3, 7), "cannot compile NVFP4 for sm_121a, 3.8 can"),
        (121, (3, 9), None),
        (130, (3, 9), "not known"),
    ],
)
def test_gaps_of_triton_by_version(arch: int, version: tuple[int, int], reason: str | None) -> None:
    said = chip.why_not_fp4(chip.chip(arch), version)
    assert said is None if reason is None else said is not None and reason in said


def test_chips_too_old() -> None:
    assert chip.why_not_triton(chip.chip(75), (3, 9)) == "sm_75 has no BF16 matrix product"
    assert chip.why_not_triton(chip.chip(90), (3, 5)) == "Triton 3.5 is older than 3.6"
    assert chip.why_not_triton(chip.chip(80), (3, 6)) is None
    assert [chip.chip(a).shared for a in (86, 90, 120, 121)] == [101376, 232448, 101376, 101376]
