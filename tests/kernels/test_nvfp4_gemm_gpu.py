"""NVFP4 products in Triton: against F64 in Triton's interpreter, as every family of chips takes them, and on CUDA.

On CUDA the same checks run on the chip that is there.  The assembly that unpacks weights cannot be interpreted;
it is followed here instruction by instruction.
"""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.kernels import chip as chips
from m27quant.kernels.nvfp4_gemm import Activations, gemm, prepare, repack
from m27quant.kernels.nvfp4_pack import PackedNVFP4, unpack
from m27quant.kernels.nvfp4_quantize import fake_quantize
from m27quant.kernels.nvfp4_quantize.reference import swizzle
from tests.kernels import interpreter
from tests.kernels.nvfp4 import E2M1, finite_scales, random_packed, values
from tests.kernels.test_nvfp4_gemm import every_code_and_scale
from tests.tolerance import product_bound

pytest.importorskip("triton", reason="needs Triton, which this platform does not have")

CHECKS = ("codes", "pairs", "sizes", "globals", "range", "rows", "special", "many_tokens", "cublas")
INPUT_SCALE = torch.tensor(0.002)
MODES: tuple[Activations, ...] = ("nvfp4", "bf16")


def check(case: str) -> None:
    """`ARCH CHECK` in the interpreter; where FP4 products are, W4A16 is the same as elsewhere."""
    arch, name = case.split()
    with interpreter.products_of(int(arch)), pytest.MonkeyPatch.context() as patches:
        if int(arch) >= 100:
            patches.setitem(globals(), "MODES", ("nvfp4",))
        on_device(name, torch.device("cpu"))


def on_device(name: str, device: torch.device) -> None:
    globals()[f"check_{name}"](device)


def to(packed: PackedNVFP4, device: torch.device) -> PackedNVFP4:
    return PackedNVFP4(*(t.to(device) for t in packed))


def judge(
    x: Tensor,
    packed: PackedNVFP4,
    activations: Activations,
    device: torch.device,
    scale: Tensor = INPUT_SCALE,
) -> None:
    weight = prepare(to(packed, device), activations=activations)
    assert weight.backend == "triton"
    assert torch.equal(weight.unpack().cpu().view(torch.int32), unpack(packed).view(torch.int32))
    y = gemm(x.to(device), weight, scale.to(device)).cpu()
    x64 = (fake_quantize(x.float(), scale) if activations == "nvfp4" else x).double()
    w64 = values(packed)
    expected = x64 @ w64.T
    assert (y.shape, y.dtype) == (expected.shape, x.dtype)
    excess = (y.double() - expected).abs() - product_bound(x64, w64, expected, x.dtype)
    assert y.isfinite().all()
    assert not (excess > 0).any(), f"{activations} {list(x.shape)} missed by {float(excess.max()):g}"


def check_codes(device: torch.device) -> None:
    """All codes under all finite scales, negative and zero ones too, come out exactly."""
    packed = every_code_and_scale()
    for dtype in (torch.bfloat16, torch.float32):
        weight = prepare(to(packed, device), activations="bf16")
        y = gemm(torch.eye(16, dtype=dtype, device=device), weight)
        assert torch.equal(y.cpu().double(), values(packed).T)


def check_pairs(device: torch.device) -> None:
    """W4A4: every code of an activation meets every code of a weight; sums of two terms are exact in F32."""
    positive = finite_scales().float()
    positive = positive[(positive >= 2.0**-6) & (positive <= 448.0)][::9]
    rows = []
    for a in range(16):
        row = torch.zeros(len(positive), 16)
        row[:, 0], row[:, 1 + a % 15] = 6.0, E2M1[a]  # the 6 makes the block scale what it is
        rows.append(row * positive[:, None])
    x, one = torch.cat(rows), torch.tensor(1.0)
    packed = every_code_and_scale()
    y = gemm(x.to(device), prepare(to(packed, device), activations="nvfp4"), one.to(device))
    assert torch.equal(y.cpu().double(), x.double() @ values(packed).T)


def check_sizes(device: torch.device) -> None:
    """Odd sizes of everything, every tile of tokens; no token at all."""
    for activations in MODES:
        for T, N, K, dtype in (
            (0, 16, 16, torch.bfloat16),
            (1, 1, 16, torch.float32),
            (3, 129, 80, torch.bfloat16),
            (17, 17, 272, torch.float32),
            (41, 70, 320, torch.bfloat16),
            (130, 66, 48, torch.bfloat16),
        ):
            judge(torch.randn(T, K).to(dtype), random_packed(N, K), activations, device)


def check_globals(device: torch.device) -> None:
    for scale_2 in (2.0**-149, 2.0**-126, 1e-30, 0.0, 1e20):
        for activations in MODES:
            judge(torch.randn(3, 64), random_packed(20, 64, scale_2=scale_2), activations, device)


def check_range(device: torch.device) -> None:
    """Activations far from what was calibrated (W4A4), and tiny and huge ones (W4A16)."""
    x = torch.randn(4, 64)
    x[1] = 0
    for scale in (2.0**-100, 1e-6, 1.0, 2.0**20):
        judge(x, random_packed(20, 64), "nvfp4", device, torch.tensor(scale))
    for magnitude in (2.0**-133, 2.0**-120, 1e-30, 1e10, 1e30):
        x = (torch.randn(3, 64).clamp(-4, 4) * magnitude).bfloat16()
        judge(x, random_packed(20, 64, scale_2=2.0**-12, usual=True), "bf16", device)


def check_rows(device: torch.device) -> None:
    """`invariant`: the same bits for a row, whatever is beside it."""
    for activations, dtype in ((mode, dtype) for mode in MODES for dtype in (torch.bfloat16, torch.float32)):
        x = torch.randn(70, 272).to(dtype).to(device)
        weight = prepare(to(random_packed(50, 272), device), activations=activations)
        scale = INPUT_SCALE.to(device)
        together = gemm(x, weight, scale, invariant=True)
        order = torch.randperm(70)
        assert torch.equal(gemm(x[order], weight, scale, invariant=True), together[order])
        for T in (1, 2, 33):
            assert torch.equal(gemm(x[:T], weight, scale, invariant=True), together[:T])


def check_special(device: torch.device) -> None:
    """Zeros give zeros, a NaN stays in its row, a matrix may be transposed in memory."""
    for activations in MODES:
        x = torch.randn(3, 32).bfloat16()
        x[1] = 0
        x[2, 5] = torch.nan
        packed = to(random_packed(20, 32, usual=True), device)
        y = gemm(x.to(device), prepare(packed, activations=activations), INPUT_SCALE.to(device)).cpu()
        assert y[0].isfinite().all()
        assert (y[1] == 0).all()
        assert y[2].isnan().all()
        strided = PackedNVFP4(packed[0].T.contiguous().T, packed[1].T.contiguous().T, packed[2])
        weight = prepare(strided, activations=activations)
        assert torch.equal(gemm(x[:2].to(device), weight, INPUT_SCALE.to(device)).cpu(), y[:2])


def check_many_tokens(device: torch.device) -> None:
    """The kernel of sm_100 for many tokens, where there is one; on other chips what takes its place."""
    from m27quant.kernels.nvfp4_gemm import gpu_tma

    with mock.patch.object(gpu_tma, "FROM_TOKENS", 20):
        for T, N, K in ((21, 40, 64), (260, 130, 320)):
            x = torch.randn(T, K).bfloat16()
            with mock.patch.object(gpu_tma, "gemm", wraps=gpu_tma.gemm) as taken:
                judge(x, random_packed(N, K, usual=True), "nvfp4", device)
            assert taken.called == chips.of(device).tmem


def check_cublas(device: torch.device) -> None:
    """The other backend is called as torch documents it; on a CPU its product is computed from what it was given."""
    if chips.why_not_fp4(chips.of(device), chips.triton_version()):
        pytest.skip("needs FP4 tensor cores")
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("M27QUANT_FP4", "cublas")
        if device.type == "cpu":
            patches.setattr(F, "scaled_mm", scaled_mm)
        for T, N, K in ((3, 48, 64), (130, 160, 192)):
            judge(torch.randn(T, K).bfloat16(), random_packed(N, K, usual=True), "nvfp4", device)
        patches.setenv("M27QUANT_FP4", "cutlass")
        with pytest.raises(ValueError, match="M27QUANT_FP4 may be"):
            judge(torch.randn(1, 32), random_packed(16, 32), "nvfp4", device)


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: list[Tensor], recipe_a: list[Any], scale_b: list[Tensor], recipe_b: list[Any],
    *, swizzle_a: list[Any], swizzle_b: list[Any], output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """torch's `scaled_mm` for NVFP4 with two levels of scales, F64 inside."""
    assert recipe_a == recipe_b == [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    assert swizzle_a == swizzle_b == [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    sides = []
    for codes, (blocks, whole) in ((a, scale_a), (b.t(), scale_b)):
        rows, columns = codes.shape[0], codes.shape[1] * 2
        assert blocks.dim() == 1
        tiles = blocks.view(-(-rows // 128), -(-columns // 64), 32, 4, 4)
        plain = repack.unswizzle(tiles, rows, columns // 16)
        sides.append(values(PackedNVFP4(codes.view(torch.uint8), plain, whole)))
    return (sides[0] @ sides[1].T).to(output_dtype)


RUNS = (
    [*(f"90 {name}" for name in CHECKS if name != "cublas"), "80 sizes"],
    [*(f"100 {name}" for name in CHECKS), "120 sizes"],
)
"""Each check for the BF16 and the FP4 product; sizes for every table of tiles."""


@pytest.mark.parametrize("cases", RUNS, ids=["hopper", "blackwell"])
def test_products_in_the_interpreter(cases: list[str]) -> None:
    interpreter.run("tests.kernels.test_nvfp4_gemm_gpu", cases)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_products_on_cuda(name: str) -> None:
    with interpreter.hardware() as device:
        on_device(name, device)


def test_repacked_weights_are_the_same_and_as_large() -> None:
    for N, K in ((16, 3072), (24, 48), (1, 16)):
        packed = random_packed(N, K)
        words, scales = repack.twiddle(packed.weight, packed.weight_scale)
        back = repack.unpack(words, scales, packed.weight_scale_2, K)
        assert torch.equal(back.view(torch.int32), unpack(packed).view(torch.int32))
        assert words.nbytes + scales.nbytes == N * -(-K // 32) * 18
        assert torch.equal(
            repack.unswizzle(swizzle(packed.weight_scale), N, K // 16).view(torch.uint8),
            packed.weight_scale.view(torch.uint8),
        )
    rows = torch.arange(48)[:, None]
    assert torch.equal(torch.cat(repack.deinterleave(repack.interleave(rows[:24], rows[24:]))), rows)


def test_assembly_unpacks_every_code_under_every_scale() -> None:
    """PTX followed with numpy: results are BF16 numbers of the columns that `repack` says, times scale * 2**-7."""
    from m27quant.kernels.nvfp4_gemm import gpu_tile

    packed = random_packed(64, 512)
    words, scales = repack.twiddle(packed.weight, packed.weight_scale)
    word = words.numpy().view(np.uint32)  # [N, C * 4]
    pair = np.repeat(scales.numpy().view(np.uint16).astype(np.uint32), 4, axis=1)
    found = follow(gpu_tile._UNPACK.value, {"$8": word, "$9": pair})
    wanted = (unpack(packed._replace(weight_scale_2=torch.tensor(1.0))) * 2.0**-7).numpy()
    wanted = wanted.reshape(64, -1, 2, 2, 4, 2)  # chunk, g, h, t, lane
    places = [(g, h, lane) for g in (0, 1) for h in (0, 1) for lane in (0, 1)]
    for result, (g, h, lane) in enumerate(places):
        value = bf16_lane(found[f"${result}"], 0).reshape(64, -1, 4)
        assert np.array_equal(value, wanted[:, :, g, h, :, lane])


def bf16_lane(register: np.ndarray, lane: int) -> np.ndarray:
    return ((register >> np.uint32(16 * lane) & np.uint32(0xFFFF)) << np.uint32(16)).view(np.float32)


def follow(assembly: str, registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run the few PTX instructions that the assembly is made of, on arrays of registers."""

    def read(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for statement in re.sub(r"[{}]", "", assembly).split(";"):
        if not statement.strip() or ".reg" in statement:
            continue
        operation, operands = statement.strip().split(None, 1)
        target, *names = [name.strip() for name in operands.split(",")]
        a = [read(name) for name in names if not name.startswith("$") or name in registers]
        if operation == "and.b32":
            result = a[0] & a[1]
        elif operation == "shl.b32":
            result = a[0] << a[1]
        elif operation == "shr.u32":
            result = a[0] >> a[1]
        elif operation == "shf.r.wrap.b32":
            assert names[0] == names[1], "a rotation"
            result = a[0] >> a[2] | a[0] << np.uint32(32) - a[2]
        elif operation == "lop3.b32":
            assert a[3] == 0xEA, "(a & b) | c"
            result = (a[0] & a[1]) | a[2]
        elif operation == "prmt.b32":
            eight = [(a[i // 4] >> np.uint32(8 * (i % 4))) & np.uint32(0xFF) for i in range(8)]
            chosen = [int(a[2]) >> 4 * i & 0xF for i in range(4)]
            result = sum(eight[c] << np.uint32(8 * i) for i, c in enumerate(chosen))
        elif operation == "mad.lo.u32":
            result = a[0] * a[1] + a[2]
        elif operation == "mov.b32" and len(names) == 2:  # into two halves
            registers[target] = a[0] & np.uint32(0xFFFF)
            target, result = names[0], a[0] >> np.uint32(16)
        elif operation == "mov.b32":
            result = a[0]
        elif operation == "fma.rn.bf16x2":
            lanes = []
            for lane in (0, 1):
                exact = bf16_lane(a[0], lane) * bf16_lane(a[1], lane) + bf16_lane(
                    a[2] + np.zeros_like(a[0]), lane
                )
                bits = exact.view(np.uint32)
                assert not (bits & np.uint32(0xFFFF)).any(), "a product that BF16 cannot hold"
                lanes.append(bits >> np.uint32(16))
            result = lanes[0] | lanes[1] << np.uint32(16)
        else:
            raise AssertionError(operation)
        registers[target] = result
    return registers
