"""NVFP4 products on a CPU, every implementation, against F64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from m27quant.errors import CheckpointError
from m27quant.kernels import cpu_level, native
from m27quant.kernels.nvfp4_gemm import Activations, gemm, prepare
from m27quant.kernels.nvfp4_pack import PackedNVFP4, unpack
from m27quant.kernels.nvfp4_quantize import fake_quantize
from tests.kernels.nvfp4 import (
    E2M1,
    finite_scales,
    implementation,  # noqa: F401  # a fixture
    num_threads,  # noqa: F401  # a fixture
    random_packed,
    values,
)
from tests.kernels.poison import poisoned  # noqa: F401  # a fixture
from tests.tolerance import product_bound

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.bfloat16, torch.float32]
INPUT_SCALE = torch.tensor(0.002)
needs_core = pytest.mark.skipif(native.load().error is not None, reason=str(native.load().error))


def judge(x: Tensor, packed: PackedNVFP4, activations: Activations, scale: Tensor = INPUT_SCALE) -> Tensor:
    """Multiplies, compares with F64 and returns the product."""
    y = gemm(x, prepare(packed, activations=activations), scale)
    x64 = (fake_quantize(x.float(), scale) if activations == "nvfp4" else x).double()
    w64 = values(packed)
    expected = x64 @ w64.T
    assert (y.shape, y.dtype) == (expected.shape, x.dtype)
    excess = (y.double() - expected).abs() - product_bound(x64, w64, expected, x.dtype)
    assert y.isfinite().all()
    assert not (excess > 0).any(), f"missed by {float(excess.max()):g}"
    return y


def every_code_and_scale() -> PackedNVFP4:
    """[254, 16]: a row for each finite E4M3 number, in it all 16 codes, in another order in each row."""
    scale_N1 = finite_scales()[:, None]
    codes_NK = (torch.arange(16) + torch.arange(254)[:, None]) % 16
    packed = codes_NK[:, 0::2] | codes_NK[:, 1::2] << 4
    return PackedNVFP4(packed.to(torch.uint8), scale_N1, torch.tensor(1.0))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_codes_under_all_scales_are_exact(dtype: torch.dtype) -> None:
    packed = every_code_and_scale()
    y = gemm(torch.eye(16, dtype=dtype), prepare(packed, activations="bf16"))
    assert torch.equal(y.double(), values(packed).T)


@pytest.mark.usefixtures("implementation")
def test_all_pairs_of_codes_are_exact() -> None:
    """W4A4: every code of an activation meets every code of a weight, under every finite scale of the weight and
    every normal one of the activation; a sum of two terms is exact in F32."""
    positive = finite_scales().float()
    positive = positive[(positive >= 2.0**-6) & (positive <= 448.0)]
    rows = []
    for a in range(16):
        row = torch.zeros(len(positive), 16)
        row[:, 0], row[:, 1 + a % 15] = 6.0, E2M1[a]  # the 6 makes the block scale what it is
        rows.append(row * positive[:, None])
    x = torch.cat(rows)
    one = torch.tensor(1.0)
    assert torch.equal(fake_quantize(x, one), x), "quantizing must not change these"
    packed = every_code_and_scale()
    assert torch.equal(
        gemm(x, prepare(packed, activations="nvfp4"), one).double(), x.double() @ values(packed).T
    )


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: torch.dtype, activations: Activations) -> None:
    for N, K in ((1, 16), (16, 16), (17, 48), (7, 64), (100, 80), (129, 272)):
        for T in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17):
            judge(torch.randn(T, K).to(dtype), random_packed(N, K), activations)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_projection_of_m27_in_part(dtype: torch.dtype, activations: Activations) -> None:
    judge(torch.randn(3, 3072).to(dtype), random_packed(96, 3072, usual=True), activations)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_huge_global_scales(dtype: torch.dtype, activations: Activations) -> None:
    for scale_2 in (2.0**-149, 2.0**-140, 2.0**-126, 1e-30, 0.0, 1e20):
        judge(torch.randn(3, 64).to(dtype), random_packed(20, 64, scale_2=scale_2), activations)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_huge_activations(dtype: torch.dtype) -> None:
    """Subnormal numbers count, and nothing overflows that fits in the end."""
    for magnitude in (2.0**-149, 2.0**-133, 2.0**-120, 1e-30, 1e10, 1e37):
        x = (torch.randn(3, 64).clamp(-4, 4) * magnitude).to(dtype)
        judge(x, random_packed(20, 64, scale_2=2.0**-12 if magnitude > 1 else 2.0**12, usual=True), "bf16")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_beyond_and_below_the_calibrated_range(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64).to(dtype)
    x[1] = 0
    for scale in (2.0**-100, 1e-6, 1.0, 2.0**20):
        judge(x, random_packed(20, 64), "nvfp4", torch.tensor(scale))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
def test_zeros_are_zero_and_a_nan_stays_in_its_row(activations: Activations) -> None:
    x = torch.randn(3, 32).bfloat16()
    x[1] = 0
    x[2, 5] = torch.nan
    y = gemm(x, prepare(random_packed(20, 32, usual=True), activations=activations), INPUT_SCALE)
    assert y[0].isfinite().all()
    assert (y[1] == 0).all()
    assert y[2].isnan().all()
    zero = PackedNVFP4(
        torch.full((4, 16), 0x80, dtype=torch.uint8), torch.zeros(4, 2).to(torch.float8_e4m3fn), INPUT_SCALE
    )
    assert (gemm(x[:2], prepare(zero, activations=activations), INPUT_SCALE) == 0).all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, activations: Activations) -> None:
    x = torch.randn(19, 272).to(dtype)
    weight = prepare(random_packed(50, 272), activations=activations)
    together = gemm(x, weight, INPUT_SCALE, invariant=True)
    order = torch.randperm(19)
    assert torch.equal(gemm(x[order], weight, INPUT_SCALE, invariant=True), together[order])
    for T in range(1, 10):
        assert torch.equal(gemm(x[:T], weight, INPUT_SCALE, invariant=True), together[:T])
        assert torch.equal(gemm(x[T : T + 1], weight, INPUT_SCALE, invariant=True), together[T : T + 1])


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
def test_threads_do_not_change_a_bit(num_threads: int, activations: Activations) -> None:  # noqa: F811
    x, packed = torch.randn(11, 512).bfloat16(), random_packed(1100, 512)
    weight = prepare(packed, activations=activations)
    y = gemm(x, weight, INPUT_SCALE, invariant=True)
    assert torch.equal(weight.unpack(), unpack(packed))
    torch.set_num_threads(1)
    assert torch.equal(gemm(x, prepare(packed, activations=activations), INPUT_SCALE, invariant=True), y)


@needs_core
@pytest.mark.parametrize(
    ("activations", "dtype", "levels"),
    [
        ("nvfp4", torch.bfloat16, cpu_level.LEVELS),  # sums of a group are integers
        ("bf16", torch.float32, ("avx2", "avx512", "avx512-bf16")),  # the same fused operations
    ],
)
def test_instruction_sets_agree_in_every_bit(
    activations: Activations, dtype: torch.dtype, levels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(5, 1536).to(dtype), prepare(random_packed(64, 1536), activations=activations)
    found = []
    for level in (level for level in levels if level in cpu_level.available()):
        monkeypatch.setenv(cpu_level.ENVIRONMENT_VARIABLE, level)
        found.append(gemm(x, weight, INPUT_SCALE))
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.usefixtures("implementation")
def test_a_prepared_weight_keeps_its_values_and_its_size() -> None:
    for N, K in ((48, 3072), (17, 80), (1, 16)):
        packed = random_packed(N, K)
        weight = prepare(packed, activations="bf16")
        assert weight.shape == (N, K)
        assert weight.unpack().view(torch.int32).equal(unpack(packed).view(torch.int32))
        rows = math.ceil(N / 16) * 16
        assert weight.nbytes <= rows * K * 9 // 16 + 4


@pytest.mark.usefixtures("implementation")
def test_tensors_that_are_not_contiguous() -> None:
    packed = random_packed(32, 64)
    strided = PackedNVFP4(
        packed.weight.T.contiguous().T, packed.weight_scale.T.contiguous().T, packed.weight_scale_2
    )
    x = torch.randn(64, 6).bfloat16()
    for activations in ("nvfp4", "bf16"):
        y = gemm(x.T, prepare(strided, activations=activations), INPUT_SCALE)
        assert torch.equal(y, gemm(x.T.contiguous(), prepare(packed, activations=activations), INPUT_SCALE))


@needs_core
def test_flushing_subnormals_in_the_callers_thread_changes_nothing(num_threads: int) -> None:  # noqa: F811
    x, packed = torch.randn(2, 512), random_packed(600, 512, scale_2=2.0**-130)
    expected = gemm(x, prepare(packed, activations="bf16"))
    assert torch.set_flush_denormal(True)
    try:
        y = gemm(x, prepare(packed, activations="bf16"))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, expected)
    assert (expected != 0).any()


@needs_core
def test_a_level_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_level.ENVIRONMENT_VARIABLE, "avx1024")
    with pytest.raises(ValueError, match="M27QUANT_CPU_LEVEL may be portable"):
        prepare(random_packed(16, 16), activations="bf16")


def broken(**changes: Tensor) -> PackedNVFP4:
    return random_packed(4, 32)._replace(**changes)


NAN_SCALE = torch.full((4, 2), torch.nan).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (broken(weight=torch.zeros(4, 16)), "codes must be U8"),
        (broken(weight=torch.zeros(0, 16, dtype=torch.uint8)), "codes must be U8"),
        (broken(weight=torch.zeros(4, 9, dtype=torch.uint8)), "18 columns"),
        (broken(weight_scale=torch.zeros(4, 2)), "block scales must be float8_e4m3fn"),
        (broken(weight_scale=NAN_SCALE[:3]), "block scales must be"),
        (broken(weight_scale=NAN_SCALE), "8 of 8 block scales are NaN, first at row 0, group 0"),
        (broken(weight_scale_2=torch.tensor(torch.nan)), "weight_scale_2 is nan"),
        (broken(weight_scale_2=torch.tensor(torch.inf)), "weight_scale_2 is inf"),
        (broken(weight_scale_2=torch.ones(2)), "one F32 number"),
        (broken(weight_scale_2=torch.tensor(1.0, dtype=torch.float64)), "one F32 number"),
    ],
)
def test_matrices_that_are_damaged(packed: PackedNVFP4, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        prepare(packed, activations="bf16")


@pytest.mark.parametrize(
    ("x", "scale", "message"),
    [
        (torch.zeros(2, 31), INPUT_SCALE, r"shape \[2, 31\], the weight needs \[T, 32\]"),
        (torch.zeros(32), INPUT_SCALE, "shape"),
        (torch.zeros(2, 32).half(), INPUT_SCALE, "float16"),
        (torch.zeros(2, 32), None, "needs the input_scale"),
        (torch.zeros(2, 32), torch.tensor(0.0), "positive"),
        (torch.zeros(2, 32), torch.tensor(torch.nan), "positive"),
        (torch.zeros(2, 32), torch.ones(1), "must be F32"),
    ],
)
def test_arguments_that_do_not_fit(x: Tensor, scale: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gemm(x, prepare(random_packed(4, 32), activations="nvfp4"), scale)


def test_a_mode_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="'nvfp4' or 'bf16'"):
        prepare(random_packed(4, 32), activations="fp8")  # type: ignore[arg-type]
