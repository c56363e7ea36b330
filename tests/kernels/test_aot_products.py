"""Every tile that a picker can choose, compiled for its chips without one: the right instruction, nothing spilled.

The launchers run as they are, at M2.7's shapes, on tensors without memory (`aot`): what is compiled is what would run.
Gaps of Triton that the pickers respect, and that these tests would meet otherwise: before 3.8 `tl.dot_scaled` aborts
for sm_121a, before 3.7 for sm_110a, always before 3.8 where it has to be decomposed, as on sm_90a (`chip`); in all
versions 64 rows of weights on sm_100a leave the FP4 tensor cores, and 256 by 256 tiles become a trap.
"""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which this platform does not have")

from m27quant.kernels import chip as chips
from m27quant.kernels import nvfp4_gemm
from m27quant.kernels.nvfp4_gemm import Activations, tiles
from m27quant.kernels.nvfp4_gemm import gpu as gemm_gpu
from m27quant.kernels.nvfp4_moe import gpu as moe_gpu
from tests.kernels import aot

D, I, E, K = 3072, 1536, 256, 8
TOKENS = {16: 32, 32: 1024, 64: 2048, 128: 4096}
"""Tokens of a layer for which a tile of so many is taken."""
INSTRUCTIONS = 4.0
"""What an H200 can issue for a weight while it reads it: 128 lanes a clock, 37 weights a clock at 4.8 TB/s, 3.5 with
nothing else to do; see docs/kernels.md."""


def layer(arch: int, activations: Activations, T: int, **options: Any) -> list[aot.Compiled]:
    """All kernels of one MoE layer for T tokens."""
    dtype = options.get("dtype", torch.bfloat16)
    with aot.launches(arch, options.get("only", "")) as compiled:
        *tensors, _ = moe_gpu.empty(E, D, options.get("intermediate", I), activations, torch.device("meta"))
        x, experts = aot.meta(T, D, dtype=dtype), aot.meta(T, K, dtype=torch.int64)
        bounds = torch.tensor([1.0, 2.0 if options.get("by_slot") else 1.0])
        moe_gpu.moe(
            x, (*tensors, bounds), experts, aot.meta(T, K, dtype=torch.float32), 0, activations, False
        )
    return compiled


def products(kernels: list[aot.Compiled]) -> list[aot.Compiled]:
    return [kernel for kernel in kernels if "BK" in kernel.constants]


@pytest.mark.parametrize("BT", TOKENS)
def test_hopper(BT: int) -> None:
    """Both modes are one product there: warp groups, weights from registers, few instructions a weight."""
    kernels = layer(90, "nvfp4", TOKENS[BT], by_slot=True)
    if BT == 16:
        kernels += layer(90, "bf16", TOKENS[BT])
    for kernel in kernels:
        kernel.check()
    for kernel in products(kernels):
        assert kernel.constants["BT"] == BT
        assert kernel.has_wgmma
        assert kernel.wgmma_from_registers
        assert unpacks_by_the_word(kernel)
        if BT < 128 and "up" in kernel.name:  # with more tokens, the tensor cores are the limit
            count = kernel.instructions_per_weight(kernel.constants["BN"] * kernel.constants["BK"])
            assert count < INSTRUCTIONS, f"{kernel!r}: {count:.2f}"


def unpacks_by_the_word(kernel: aot.Compiled) -> bool:
    """One word for one call of the assembly: what Triton packs together, it takes in a thread's order, not a row's."""
    packed = re.findall(r"elementwise_inline_asm.*?packed_element = (\d+)", kernel.ttgir, re.S)
    return set(packed) == {"1"}


@pytest.mark.parametrize(("arch", "BT"), [*((arch, BT) for arch in (100, 120) for BT in TOKENS), (121, 32)])
def test_blackwell_w4a4(arch: int, BT: int) -> None:
    """FP4 tensor cores at every tile; sm_121a is sm_120a by another name, so one tile shows that it compiles."""
    if missing := chips.why_not_fp4(chips.chip(arch), chips.triton_version()):
        pytest.skip(missing)
    for kernel in layer(arch, "nvfp4", TOKENS[BT]):
        kernel.check()
        if "BK" in kernel.constants:
            assert kernel.constants["BT"] == BT
            assert kernel.has_fp4


@pytest.mark.parametrize("BT", TOKENS)
@pytest.mark.parametrize("arch", [100, 120])
def test_blackwell_w4a16(arch: int, BT: int) -> None:
    for kernel in layer(arch, "bf16", TOKENS[BT], only="up"):
        kernel.check()
        assert unpacks_by_the_word(kernel)
        assert kernel.count(r"tcgen05\.mma|mma\.sync")


@pytest.mark.parametrize(("arch", "activations"), [(90, "bf16"), (100, "nvfp4")])
def test_a_shard_of_tensor_parallelism_8(arch: int, activations: Activations) -> None:
    """192 columns: no tile divides them, and loads are masked."""
    (kernel,) = layer(arch, activations, TOKENS[64], only="down", intermediate=192)
    kernel.check()
    assert kernel.has_fp4 == (arch == 100)


@pytest.mark.parametrize("T", [32, 4096])
def test_ampere(T: int) -> None:
    """No FP8 type and less shared memory."""
    for kernel in layer(80, "nvfp4", T):
        kernel.check()
        assert kernel.shared <= chips.chip(86).shared


@pytest.mark.parametrize("arch", [90, 120])
def test_f32_activations(arch: int) -> None:
    (kernel,) = layer(arch, "bf16", 1, dtype=torch.float32, only="up")
    kernel.check()


@pytest.mark.parametrize(("arch", "fp4"), [(90, False), (100, True)])
def test_dense_products(arch: int, fp4: bool) -> None:
    """The same tiles in another kernel."""
    N = 3072
    scale = aot.meta(dtype=torch.float32)
    with aot.launches(arch) as compiled:
        for activations in ("nvfp4", "bf16"):
            tensors = prepared(arch, N, D, activations)
            gemm_gpu.gemm(aot.meta(1, D), (*tensors, scale), (N, D), activations, scale, False)
    for kernel in compiled:
        kernel.check()
    assert any(kernel.has_fp4 for kernel in compiled) == fp4


def test_many_tokens_on_sm_100() -> None:
    """TMA, and scales that go from shared to tensor memory without touching a register."""
    scale = aot.meta(dtype=torch.float32)
    with aot.launches(100, "tma") as compiled:
        tensors = prepared(100, D, D, "nvfp4")
        gemm_gpu.gemm(aot.meta(4096, D), (*tensors, scale), (D, D), "nvfp4", scale, False)
    (kernel,) = compiled
    kernel.check()
    assert kernel.has_fp4
    assert kernel.count(r"cp\.async\.bulk\.tensor\.5d")
    assert kernel.count(r"tcgen05\.cp") >= 24
    assert kernel.tmem == chips.TMEM_COLUMNS


def prepared(arch: int, N: int, K: int, activations: str) -> tuple[torch.Tensor, torch.Tensor]:
    if gemm_gpu.is_fp4(chips.chip(arch), activations):
        return aot.meta(N, K // 2, dtype=torch.uint8), aot.meta(
            N // 128, K // 64, 32, 4, 4, dtype=torch.float8_e4m3fn
        )
    return aot.meta(N, K // 8, dtype=torch.int32), aot.meta(N, K // 32, dtype=torch.int16)


@pytest.mark.parametrize("tokens", [1, 16, 17, 40, 41, 96, 97, 1e6])
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120, 121])
def test_every_choice_is_one_of_those_compiled(arch: int, tokens: float) -> None:
    """Whatever the number of tokens, the tile is one that the tests above compile."""
    chip = chips.chip(arch)
    for pick in (tiles.bf16, tiles.fp4):
        taken = {pick(chip, TOKENS[BT] * K / E, False) for BT in TOKENS}
        assert {tile.BT for tile in taken} == set(TOKENS)
        assert pick(chip, tokens, False) in taken
        assert pick(chip, tokens, True) in taken
    assert tiles.bf16(chip, tokens, False, f32=True).BT <= 32


def test_triton_without_fp4_for_a_chip_takes_bf16() -> None:
    chip = chips.chip(121)
    with mock.patch.object(chips, "triton_version", return_value=(3, 6)):
        assert not gemm_gpu.is_fp4(chip, "nvfp4")
    with mock.patch.object(chips, "triton_version", return_value=(3, 8)):
        assert gemm_gpu.is_fp4(chip, "nvfp4")
        assert not gemm_gpu.is_fp4(chip, "bf16")


@pytest.mark.parametrize(
    ("arch", "version", "backend", "reason"),
    [
        (75, (3, 9), "reference", "sm_75 has no BF16 matrix product"),
        (90, (3, 6), "triton", "W4A4 in BF16, sm_90a has no FP4 tensor cores"),
        (121, (3, 7), "triton", "W4A4 in BF16, Triton 3.7 cannot compile NVFP4 for sm_121a, 3.8 can"),
        (100, (3, 6), "triton", "W4A4 on FP4 tensor cores of sm_100a"),
    ],
)
def test_the_choice_is_told(arch: int, version: tuple[int, int], backend: str, reason: str) -> None:
    with (
        mock.patch.object(chips, "of", return_value=chips.chip(arch)),
        mock.patch.object(chips, "triton_version", return_value=version),
    ):
        choice = nvfp4_gemm.choose("nvfp4_moe", "cuda")
    assert choice.backend == backend
    assert choice.reason.endswith(reason)


def test_amd_chips_take_plain_torch() -> None:
    with mock.patch.object(torch.version, "hip", "7.0"):
        choice = nvfp4_gemm.choose("nvfp4_gemm", "cuda")
    assert choice.backend == "reference"
    assert "PTX" in choice.reason
