"""Activations to NVFP4 against a derivation in F64 that rounds where the formula says so, element by element."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m27quant.kernels.nvfp4_pack.reference import unpack
from m27quant.kernels.nvfp4_quantize import fake_quantize, is_usable, quantize, reference
from tests.kernels.packing import assert_same_bytes
from tests.kernels.poison import poisoned  # noqa: F401  # a fixture
from tests.tolerance import sqnr_db

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = sorted(
    {m * 2.0**-9 for m in range(8)}
    | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)}
)
LARGEST = float(np.finfo(np.float32).max)
# 16 numbers of one group as multiples of input_scale, from far below the smallest block scale to far above 2688.
groups = st.lists(st.floats(-4000, 4000, width=32), min_size=16, max_size=16)
scales = st.floats(2**-20, 2**10, width=32)


def f32(value: float) -> float:
    """One rounding: the F64 result of one operation on F32 operands, to F32."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def nearest(value: float, grid: list[float] | tuple[float, ...]) -> int:
    """Index of the nearest grid point, exactly; of two equally near ones the even index."""
    exact = Fraction(value)
    return min(range(len(grid)), key=lambda i: (abs(Fraction(grid[i]) - exact), i % 2))


def derived(x_16: list[float], input_scale: float) -> tuple[list[int], float]:
    """Codes and block scale of one group by the formula; quotients of F32 numbers are rounded once through F64,
    which is exact rounding, as F64 has more than twice the digits."""
    S = f32(1 / input_scale)
    wanted = f32(max(map(abs, x_16)) * f32(S * f32(1 / 6)))
    block_scale = E4M3[nearest(min(wanted, 448.0), E4M3)]
    product = f32(block_scale * f32(1 / S))
    factor = min(f32(1 / product), LARGEST) if product else LARGEST
    codes = []
    for x in x_16:
        y = min(abs(f32(x * factor)), 1e30)
        codes.append(nearest(min(y, 6.0), VALUES) + 8 * int(np.signbit(x)))
    return codes, block_scale


def unpacked(codes_K2: torch.Tensor) -> list[int]:
    return [int(c) for byte in codes_K2.tolist() for c in (byte & 15, byte >> 4)]


def agree(x_16: list[float], input_scale: float) -> None:
    codes, block_scale = quantize(torch.tensor([x_16]), torch.tensor(input_scale))
    assert (codes.shape, block_scale.shape) == ((1, 8), (1, 1))
    expected = derived(x_16, input_scale)
    assert (unpacked(codes[0]), float(block_scale)) == expected


@given(groups, scales)
def test_any_group(multiples: list[float], scale: float) -> None:
    scale = f32(scale)
    agree([f32(m * scale) for m in multiples], scale)


@pytest.mark.parametrize("amax", [0.0, 2**-140, 6 * 2**-11, 6 * 2**-10, 6 * 2**-9, 1.0, 2688.0, 1e6])
def test_ties_zeros_small_and_large_groups(amax: float) -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -2.5, -5.0, -0.0, 0.0, 6.0, -6.0]
    agree([f32(t / 6 * amax) for t in ties], 1.0)


def test_ties_go_to_the_even_code_and_zero_keeps_its_sign() -> None:
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.0, -0.1, 0.1, -6.0, 0, 0, 0, 0]])
    codes, block_scale = quantize(x, torch.tensor(1.0))
    assert float(block_scale) == 1.0
    assert unpacked(codes[0]) == [0, 2, 2, 4, 4, 6, 6, 7, 8, 8, 0, 15, 0, 0, 0, 0]


def test_what_exceeds_the_calibrated_range_saturates_and_a_nan_stays_in_its_group() -> None:
    x = torch.zeros(2, 32)
    x[0, 0], x[0, 16], x[1, 3] = 1e30, torch.inf, torch.nan
    x[0, 5] = 1.0
    out = fake_quantize(x, torch.tensor(1.0))
    assert (float(out[0, 0]), float(out[0, 16]), float(out[0, 5])) == (2688.0, 2688.0, 0.0)
    assert out[1, :16].isnan().all()
    assert (out[1, 16:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_quantization_is_what_the_codes_stand_for(dtype: torch.dtype) -> None:
    x = torch.randn(40, 64).to(dtype)
    scale = x.abs().amax().float() / 2688
    out = fake_quantize(x, scale)
    assert out.dtype == dtype
    assert torch.equal(out, unpack(*quantize(x, scale), scale).to(dtype))
    assert torch.equal(fake_quantize(x.float(), scale), unpack(*quantize(x, scale), scale))


def test_signal_to_noise_of_gaussians(record_property: object) -> None:
    x = torch.randn(256, 256)
    found = sqnr_db(x, fake_quantize(x, x.abs().amax() / 2688))
    record_property("sqnr_db", round(found, 2))  # type: ignore[operator]  # pytest's fixture is a function
    assert found > 20
    assert sqnr_db(x, fake_quantize(x, x.abs().amax() / 2688 / 4)) < found - 6, "clipped"


def test_codes_that_are_there_already_come_back() -> None:
    """Quantizing what NVFP4 stands for changes nothing, where each group has a 6 of its own."""
    codes = torch.randint(0, 256, (8, 32), dtype=torch.uint8)
    codes[:, ::8] = 0x77
    scale = torch.randint(8, 0x7E, (8, 4), dtype=torch.uint8).view(torch.float8_e4m3fn)
    x = unpack(codes, scale, torch.tensor(2.0**-7))
    assert torch.equal(fake_quantize(x, torch.tensor(2.0**-7)), x)


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.inf, torch.nan, 2.0**-140])
def test_scales_that_cannot_be_used(bad: float) -> None:
    assert not is_usable(torch.tensor(bad))
    with pytest.raises(ValueError, match="input_scale"):
        quantize(torch.zeros(1, 16), torch.tensor(bad))


@pytest.mark.parametrize("x", [torch.zeros(16), torch.zeros(2, 17), torch.zeros(2, 16, dtype=torch.int32)])
def test_shapes_that_do_not_fit(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="activations"):
        quantize(x, torch.tensor(1.0))


def hard_rows(dtype: torch.dtype) -> torch.Tensor:
    """[150, 80]: groups of all magnitudes that a dtype has, ties, zeros of both signs, NaN of both signs, Inf."""
    g = torch.Generator().manual_seed(3)
    exponent = torch.randint(-150, 127, (150, 5, 1), generator=g).double()
    x = (torch.randn(150, 5, 16, generator=g).double() * exponent.exp2()).flatten(1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(10)
    x[0:20] = ties * torch.randint(-10, 10, (20, 1), generator=g).double().exp2()
    x[20:30] *= 0.0
    flat = x[30:60].view(-1)
    flat[::7], flat[::11], flat[::13], flat[::17] = torch.nan, torch.inf, -torch.nan, -torch.inf
    return x.to(dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["plain", "swizzled"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_core_gives_the_references_bytes(
    dtype: torch.dtype, layout: Literal["plain", "swizzled"], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = hard_rows(dtype)
    x = torch.cat((x, x.flip(1), x.roll(1, 0), torch.randn(2000, 80).to(dtype)))  # enough for two threads
    before = torch.get_num_threads()
    for scale in (2.0**-127, 1e-30, 2.0**-20, 0.002, 1.0, 448.0, 1e30, 3e38):
        torch.set_num_threads(threads)
        found = quantize(x, torch.tensor(scale), layout=layout)
        torch.set_num_threads(before)
        with monkeypatch.context() as patch:
            patch.setenv("M27QUANT_KERNELS", "reference")
            assert_same_bytes(found, quantize(x, torch.tensor(scale), layout=layout))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize(("T", "K"), [(0, 64), (1, 16), (33, 64), (128, 80), (300, 272)])
def test_swizzled_scales_lie_where_the_formula_says(
    T: int, K: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row t, group g at ((t/128) * ceil(G/4) + g/4) * 512 + (t%32) * 16 + ((t/32)%4) * 4 + g%4; 0 elsewhere."""
    monkeypatch.setenv("M27QUANT_KERNELS", kernels)
    x, one = torch.randn(T, K), torch.tensor(0.002)
    plain = quantize(x, one).block_scale.view(torch.uint8)
    swizzled = quantize(x, one, layout="swizzled").block_scale
    assert swizzled.shape == (-(-T // 128), -(-K // 64), 32, 4, 4)
    expected = torch.zeros(swizzled.numel(), dtype=torch.uint8)
    for t in range(T):
        for g in range(K // 16):
            at = (t // 128 * -(-K // 64) + g // 4) * 512 + t % 32 * 16 + t // 32 % 4 * 4 + g % 4
            expected[at] = plain[t, g]
    assert torch.equal(swizzled.flatten().view(torch.uint8), expected)


def test_a_layout_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="'plain' or 'swizzled'"):
        quantize(torch.zeros(1, 16), torch.tensor(1.0), layout="linear")  # type: ignore[arg-type]


def test_what_overflows_as_a_reciprocal_is_not_usable() -> None:
    for value in (2.0**-128, 2.0**-128 * (1 + 2.0**-20), 2.0**-127):
        scale = torch.tensor(value)
        assert is_usable(scale) == bool(scale.reciprocal().isfinite())
    assert not is_usable(torch.ones(2))
    assert reference.F32_MAX == LARGEST
