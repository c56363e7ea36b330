"""NVFP4 packing: every backend gives nvidia-modelopt's bytes, and refuses what has no bytes."""

from __future__ import annotations

import math
import shutil
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m27quant.errors import CheckpointError
from m27quant.kernels import dispatch, native, nvfp4_pack
from m27quant.kernels.nvfp4_pack import PackedNVFP4, reference
from tests.kernels import packing
from tests.kernels.packing import BLOCK, FP8, assert_same_bytes
from tests.tolerance import SQNR_NVFP4_WEIGHT_DB

CPU_BACKENDS = ["reference"] + (["cpu-native"] if native.load().error is None else [])

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert dispatch.choose("nvfp4_pack", "cpu").backend == request.param
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bf16(values: list[float]) -> Tensor:
    """One row of BF16 weights; a value that BF16 rounds is a mistake of the test."""
    row = torch.tensor([values], dtype=torch.bfloat16)
    assert row.tolist() == [values]
    return row


def scale_byte(packed: PackedNVFP4) -> list[int]:
    return packed.weight_scale.view(torch.uint8).flatten().tolist()


def nibbles(packed: PackedNVFP4) -> list[int]:
    return [n for byte in packed.weight.flatten().tolist() for n in (byte & 15, byte >> 4)]


# ---- against modelopt -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "K"), [(1, 16), (5, 48), (127, 144), (128, 128), (129, 112), (200, 272), (384, 640)]
)
def test_bytes_of_fp8_weights_are_modelopts(backend: str, N: int, K: int) -> None:
    weight, scale_inv = packing.random_fp8(N, K, seed=N)
    x = packing.dequantized(weight, scale_inv)
    amax = nvfp4_pack.amax(weight, scale_inv)
    assert torch.equal(amax, x.abs().max().float())
    packed = nvfp4_pack.pack(weight, scale_inv, amax=amax)
    assert_same_bytes(packed, packing.modelopt_pack(x, x.abs().max()))
    assert torch.equal(nvfp4_pack.unpack(packed), packing.modelopt_unpack(packed))


@pytest.mark.parametrize("spread", [0.02, 1e-30, 1e30])
def test_bytes_of_bf16_weights_are_modelopts(backend: str, spread: float) -> None:
    x = (torch.randn(96, 512) * spread * torch.exp2(torch.randint(-20, 4, (96, 1)))).bfloat16()
    amax = nvfp4_pack.amax(x)
    assert torch.equal(amax, x.abs().max().float())
    assert_same_bytes(nvfp4_pack.pack(x, amax=amax), packing.modelopt_pack(x, x.abs().max()))


def test_bytes_under_the_amax_of_a_partner(backend: str) -> None:
    """w1 and w3 share the larger amax: weight_scale_2 is then not the weight's own."""
    weight, scale_inv = packing.random_fp8(130, 160)
    for factor in (1.0, 1.7, 300.0, 2.0**20):
        amax = nvfp4_pack.amax(weight, scale_inv) * factor
        packed = nvfp4_pack.pack(weight, scale_inv, amax=amax)
        assert_same_bytes(packed, packing.modelopt_pack(packing.dequantized(weight, scale_inv), amax))


@pytest.mark.parametrize("partner", [1.0, 1.37, 5e-3, 2.0**12], ids=lambda f: f"amax*{f:g}")
def test_every_code_under_every_maximum_and_block_scale(backend: str, partner: float) -> None:
    """All 254 codes in groups of all 127 maxima, under block scales of all sizes, as FP8 and as BF16."""
    weight = packing.every_code_under_every_maximum()
    block = tuple(weight.shape)
    for scale in packing.block_scales():
        scale_inv = torch.tensor([[scale]])
        x = packing.dequantized(weight, scale_inv, block)
        amax = nvfp4_pack.amax(weight, scale_inv, block=block)
        assert torch.equal(amax, x.abs().max().float())
        amax = amax * partner
        if not 2.0**-133 <= amax < math.inf:
            continue  # no amax of a BF16 weight: refused, see test_amax_that_no_weight_has
        packed = nvfp4_pack.pack(weight, scale_inv, amax=amax, block=block)
        assert_same_bytes(packed, packing.modelopt_pack(x, amax))
        assert_same_bytes(nvfp4_pack.pack(x, amax=amax), packed)


def test_blocks_of_very_different_scales_in_one_weight(backend: str) -> None:
    """The largest block sets weight_scale_2; others fall through the subnormal scales to the floor."""
    weight = packing.random_codes(256, 384)
    scale_inv = torch.tensor([[1.0, 2**-5, 2**-12], [2**-17, 2**-19, 0.0]])
    x = packing.dequantized(weight, scale_inv)
    packed = nvfp4_pack.pack(weight, scale_inv, amax=nvfp4_pack.amax(weight, scale_inv))
    assert_same_bytes(packed, packing.modelopt_pack(x, x.abs().max()))
    low = packed.weight_scale.view(torch.uint8)
    assert {1, 2, 3, 4, 5, 6, 7} < set(low.flatten().tolist()), "no subnormal block scales: not a test"
    assert low[128:, 16:].eq(0x38).all(), "all-zero groups have scale 1"


def test_a_million_random_weights(backend: str) -> None:
    """BF16 patterns at random over 60 binades: every sign, exponent and mantissa in use."""
    bits = torch.randint(0, 1 << 16, (512, 2048)).int()
    exponent = 60 + (bits >> 7 & 255) % 60
    x = (bits & 0x807F | exponent << 7).to(torch.uint16).view(torch.bfloat16)
    amax = nvfp4_pack.amax(x)
    assert_same_bytes(nvfp4_pack.pack(x, amax=amax), packing.modelopt_pack(x, amax))


# ---- the format -------------------------------------------------------------------------------------------


def test_golden_bytes(backend: str) -> None:
    """Two groups by hand: weight_scale_2 = 1, scales 1 and 2, so values are E2M1 times 1 and 2."""
    first = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, -0.125]
    second = [12.0, -12.0, 8.0, 0.25, -0.25, 0.5, 2.5, -2.5, 0.0, 0.0, 1.5, 3.5, 4.5, 5.0, 7.0, 10.0]
    packed = nvfp4_pack.pack(bf16(first + second), amax=torch.tensor(2688.0))
    assert packed.weight_scale_2.item() == 1.0
    assert scale_byte(packed) == [0x38, 0x40]
    assert packed.weight.numpy().tobytes().hex(" ", 4) == "10325476 a9cbed8f f70608a2 00424466"


def test_ties_go_to_the_even_code(backend: str) -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    packed = nvfp4_pack.pack(bf16([*ties, *(-t for t in ties), 6.0, 0.0]), amax=torch.tensor(2688.0))
    assert nibbles(packed) == [0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 7, 0]


def test_neighbours_of_ties(backend: str) -> None:
    below = [0.2490234375, 0.74609375, 1.2421875, 1.7421875, 2.484375, 3.484375, 4.96875]
    above = [0.251953125, 0.75390625, 1.2578125, 1.7578125, 2.515625, 3.515625, 5.03125]
    packed = nvfp4_pack.pack(bf16([*below, *above, 6.0, -6.0]), amax=torch.tensor(2688.0))
    assert nibbles(packed) == [0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7, 7, 15]


def test_sign_of_zero(backend: str) -> None:
    """-0.0 has code 0; a negative number that rounds to zero keeps its sign: both as modelopt does."""
    x = bf16([6.0, 0.0, -0.0, -0.125, 0.125] + [0.0] * 11)
    assert nibbles(nvfp4_pack.pack(x, amax=torch.tensor(2688.0)))[:5] == [7, 0, 0, 8, 0]
    weight = torch.tensor([[0x7E, 0x00, 0x80, 0x81, 0x01] + [0x80] * 11], dtype=torch.uint8).view(FP8)
    scale_inv = torch.tensor([[2.0**-10]])
    packed = nvfp4_pack.pack(weight, scale_inv, amax=nvfp4_pack.amax(weight, scale_inv))
    assert nibbles(packed)[:6] == [7, 0, 0, 8, 0, 0]


def test_a_product_that_underflows_to_zero_has_no_sign(backend: str) -> None:
    weight = torch.tensor([[0x81] * 16], dtype=torch.uint8).view(FP8)  # -2**-9
    scale_inv = torch.tensor([[2.0**-130]])  # the product 2**-139 is 0 in BF16
    packed = nvfp4_pack.pack(weight, scale_inv, amax=torch.tensor(1.0))
    assert (nibbles(packed), scale_byte(packed)) == ([0] * 16, [0x38])


def test_a_quotient_that_underflows_to_zero_has_no_sign(backend: str) -> None:
    """y = x / d rounds to 0 up to 2**-150, a tie, and to the smallest F32 above it."""
    x = bf16([6 * 2.0**18, -(2.0**-132), -3 * 2.0**-133, -(2.0**-131)] + [0.0] * 12)
    amax = torch.tensor(2688.0 * 2**10)  # weight_scale_2 = 2**10, scale 2**8, d = 2**18
    packed = nvfp4_pack.pack(x, amax=amax)
    assert nibbles(packed)[:4] == [7, 0, 8, 8]
    assert_same_bytes(packed, packing.modelopt_pack(x, amax))

    # 448, -2**-5, -1.125 * 2**-5, -1.875 * 2**-6 under a scale at its floor 2**-9: d = 2**91
    weight = torch.tensor([[0x7E, 0x90, 0x91, 0x8F] * 4], dtype=torch.uint8).view(FP8)
    scale_inv, amax = torch.tensor([[2.0**-54]]), torch.tensor(2688.0 * 2.0**100)
    packed = nvfp4_pack.pack(weight, scale_inv, amax=amax)
    assert nibbles(packed)[:4] == [0, 0, 8, 0]
    assert scale_byte(packed) == [0x01]
    assert_same_bytes(packed, packing.modelopt_pack(packing.dequantized(weight, scale_inv), amax))


def test_scales_saturate_at_448_and_never_fall_below_the_smallest(backend: str) -> None:
    x = bf16([1.0] * 16 + [2.0**-12] * 16 + [2.0**-30] * 16)
    packed = nvfp4_pack.pack(x, amax=torch.tensor(0.5))
    assert scale_byte(packed) == [0x7E, 0x26, 0x01]
    assert nibbles(packed) == [7] * 16 + nibbles(packed)[16:32] + [0] * 16
    assert_same_bytes(packed, packing.modelopt_pack(x, torch.tensor(0.5)))
    counts = nvfp4_pack.count_groups(x, None, packed.weight_scale_2)
    assert counts == (0, 1, 1)


def test_a_dead_weight_has_a_usable_scale(backend: str) -> None:
    """modelopt would write scale 0 and NaN; its rule for a zero amax elsewhere is the quantizer's maximum, 6."""
    for weight, scale_inv in (
        (torch.zeros(32, 64, dtype=torch.bfloat16), None),
        (torch.zeros(32, 64).to(FP8), torch.ones(1, 1)),
        (packing.random_codes(32, 64), torch.zeros(1, 1)),
    ):
        amax = nvfp4_pack.amax(weight, scale_inv)
        packed = nvfp4_pack.pack(weight, scale_inv, amax=amax)
        assert amax.item() == 0
        assert torch.equal(packed.weight_scale_2, torch.tensor(6.0) / torch.tensor(2688.0))
        assert set(scale_byte(packed)) == {0x38}
        assert not packed.weight.any()
        assert nvfp4_pack.squared_error(weight, scale_inv, packed) == (0.0, 0.0)
        assert nvfp4_pack.count_groups(weight, scale_inv, packed.weight_scale_2).zero == 32 * 4


def test_smallest_amax_of_all(backend: str) -> None:
    """2**-133, the smallest BF16: weight_scale_2 is subnormal but not zero, and no scale product is zero."""
    x = torch.full((1, 16), 2.0**-133, dtype=torch.bfloat16)
    packed = nvfp4_pack.pack(x, amax=nvfp4_pack.amax(x))
    assert packed.weight_scale_2 > 0
    assert_same_bytes(packed, packing.modelopt_pack(x, x.abs().max()))


def test_all_256_bytes_unpack_and_pack_again(backend: str) -> None:
    """Under scale 1 each nibble is its E2M1 value; only the negative zero comes back as zero."""
    codes = torch.arange(256, dtype=torch.uint8).view(32, 8)
    packed = PackedNVFP4(codes, torch.ones(32, 1).to(FP8), torch.tensor(1.0))
    values = nvfp4_pack.unpack(packed)
    table = E2M1 + [-v for v in E2M1]
    expected = [table[n] for byte in range(256) for n in (byte & 15, byte >> 4)]
    assert values.flatten().tolist() == expected
    assert torch.equal(values, packing.modelopt_unpack(packed))

    full = values.clone()
    full[:, 0] = 6.0  # the maximum that gives scale 1 back
    again = nibbles(nvfp4_pack.pack(full.bfloat16(), amax=torch.tensor(2688.0)))
    wanted = [0 if n == 8 else n for n in nibbles(packed)]
    wanted[0::16] = [7] * 32
    assert again == wanted


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_packing_its_own_values_changes_nothing(data: st.DataObject) -> None:
    """With a power of two as weight_scale_2 the values are exact in BF16, so a full group comes back whole."""
    exponent = data.draw(st.integers(-80, 80), "exponent")
    codes = data.draw(st.lists(st.integers(0, 15), min_size=64, max_size=64), "codes")
    scales = data.draw(st.lists(st.integers(1, 0x7E), min_size=4, max_size=4), "scales")
    codes = [0 if c == 8 else c for c in codes]
    codes[0::16] = [7] * 4
    packed = PackedNVFP4(
        torch.tensor([[low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]]).byte(),
        torch.tensor([scales], dtype=torch.uint8).view(FP8),
        torch.tensor(2.0**exponent),
    )
    x = nvfp4_pack.unpack(packed, torch.bfloat16)
    assert_same_bytes(nvfp4_pack.pack(x, amax=torch.tensor(2688.0 * 2.0**exponent)), packed)
    assert nvfp4_pack.squared_error(x, None, packed).noise == 0


@given(seed=st.integers(0, 10**6), N=st.integers(1, 40), G=st.integers(1, 9), log2=st.integers(-60, 60))
@settings(max_examples=40, deadline=None)
def test_error_stays_within_half_a_step(seed: int, N: int, G: int, log2: int) -> None:
    """No value moves by more than half the widest E2M1 step (1, between 4 and 6), nor changes its sign."""
    weight, scale_inv = packing.random_fp8(N, 16 * G, seed)
    scale_inv *= 2.0**log2
    packed = nvfp4_pack.pack(weight, scale_inv, amax=nvfp4_pack.amax(weight, scale_inv))
    x, y = packing.dequantized(weight, scale_inv).double(), nvfp4_pack.unpack(packed).double()
    step = (packed.weight_scale.double() * packed.weight_scale_2.double()).repeat_interleave(16, 1)
    assert ((x - y).abs() <= step * (1 + 1e-6)).all()
    assert (x * y >= 0).all()


# ---- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["amax", "pack"])
@pytest.mark.parametrize("bad", [0x7F, 0xFF])
def test_nan_codes_are_refused_with_their_position(backend: str, call: str, bad: int) -> None:
    weight, scale_inv = packing.random_fp8(300, 160)
    weight.view(torch.uint8)[[130, 299], [77, 159]] = bad
    with pytest.raises(CheckpointError, match=r"2 of 48000 weights .* first at row 130, column 77"):
        _call(call, weight, scale_inv)


@pytest.mark.parametrize("call", ["amax", "pack"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_bf16_weights_are_refused(backend: str, call: str, bad: float) -> None:
    weight = torch.randn(33, 64).bfloat16()
    weight[32, 63] = bad
    with pytest.raises(CheckpointError, match=r"1 of 2112 weights .* first at row 32, column 63"):
        _call(call, weight, None)


@pytest.mark.parametrize("call", ["amax", "pack"])
def test_products_that_overflow_bf16_are_refused(backend: str, call: str) -> None:
    """Finite codes and a finite scale, but 448 * 1e36 is beyond BF16."""
    weight = torch.zeros(130, 144).to(FP8)
    weight.view(torch.uint8)[129, 143] = 0xFE
    scale_inv = torch.tensor([[1.0, 1.0], [1.0, 1e36]])
    with pytest.raises(CheckpointError, match=r"1 of 18720 weights .* first at row 129, column 143"):
        _call(call, weight, scale_inv)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-3])
def test_bad_block_scales_are_refused(backend: str, bad: float) -> None:
    weight, scale_inv = packing.random_fp8(300, 160)
    scale_inv[1, 1] = scale_inv[2, 0] = bad
    for call in ("amax", "pack"):
        with pytest.raises(
            CheckpointError, match=r"2 of 6 values of weight_scale_inv .* row 1, column 1: -?\w"
        ):
            _call(call, weight, scale_inv)


@pytest.mark.parametrize(
    ("weight", "scale_inv", "message"),
    [
        (torch.zeros(16, 16), None, "torch.float32, NVFP4 packing takes FP8 or BF16"),
        (torch.zeros(16, 16).half(), None, "torch.float16"),
        (torch.zeros(16, 16).to(torch.float8_e5m2), None, "torch.float8_e5m2"),
        (torch.zeros(16, 16).to(FP8), None, "no weight_scale_inv"),
        (torch.zeros(16, 24).bfloat16(), None, "24 columns, not a multiple of 16"),
        (torch.zeros(16, 24).to(FP8), torch.ones(1, 1), "24 columns"),
        (torch.zeros(16).bfloat16(), None, r"shape \[16\]"),
        (torch.zeros(0, 16).bfloat16(), None, r"shape \[0, 16\]"),
        (torch.zeros(2, 16, 16).to(FP8), torch.ones(1, 1), r"shape \[2, 16, 16\]"),
        (torch.zeros(129, 16).to(FP8), torch.ones(1, 1), r"shape \[1, 1\], a weight of shape \[129, 16\]"),
        (torch.zeros(16, 16).to(FP8), torch.ones(1, 1).double(), "weight_scale_inv is torch.float64"),
        (torch.zeros(16, 16).bfloat16(), torch.ones(1, 1), "weight is torch.bfloat16"),
    ],
)
def test_what_is_no_weight_is_refused(weight: Tensor, scale_inv: Tensor | None, message: str) -> None:
    for call in ("amax", "pack"):
        with pytest.raises(CheckpointError, match=message):
            _call(call, weight, scale_inv)


@pytest.mark.parametrize(
    "amax",
    [
        torch.tensor(-1.0),
        torch.tensor(math.nan),
        torch.tensor(math.inf),
        torch.tensor(2.0**-134),
        torch.tensor([1.0]),
        torch.tensor(1.0).double(),
    ],
)
def test_amax_that_no_weight_has(amax: Tensor) -> None:
    with pytest.raises(ValueError, match="amax must be"):
        nvfp4_pack.pack(torch.ones(1, 16).bfloat16(), amax=amax)


def test_out_that_does_not_fit() -> None:
    weight, amax = torch.ones(2, 32).bfloat16(), torch.tensor(1.0)
    codes, scale = torch.empty(2, 16, dtype=torch.uint8), torch.empty(2, 2, dtype=FP8)
    for out in (
        (codes[:1], scale),
        (codes.view(torch.int8), scale),
        (codes, scale.float()),
        (codes.T.contiguous().T, scale),
    ):
        with pytest.raises(ValueError, match="out needs"):
            nvfp4_pack.pack(weight, amax=amax, out=out)


def _call(name: str, weight: Tensor, scale_inv: Tensor | None) -> object:
    if name == "amax":
        return nvfp4_pack.amax(weight, scale_inv)
    return nvfp4_pack.pack(weight, scale_inv, amax=torch.tensor(1.0))


# ---- buffers, threads, backends ---------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [0xA5, 0x7F])
def test_every_output_byte_is_written(backend: str, poison: int) -> None:
    """Into buffers full of garbage (0x7f is NaN as E4M3), and into the very tensors that were given."""
    for weight, scale_inv in (packing.random_fp8(141, 176), (torch.randn(141, 176).bfloat16(), None)):
        amax = nvfp4_pack.amax(weight, scale_inv)
        codes = torch.full((141, 88), poison, dtype=torch.uint8)
        scale = torch.full((141, 11), poison, dtype=torch.uint8).view(FP8)
        packed = nvfp4_pack.pack(weight, scale_inv, amax=amax, out=(codes, scale))
        assert packed.weight is codes
        assert packed.weight_scale is scale
        assert_same_bytes(packed, nvfp4_pack.pack(weight, scale_inv, amax=amax))


def test_strided_input_is_the_same_weight(backend: str) -> None:
    weight, scale_inv = packing.random_fp8(160, 256)
    wide = torch.cat((weight.view(torch.uint8), weight.view(torch.uint8)), 1)[:, :256].view(FP8)
    assert not wide.is_contiguous()
    amax = nvfp4_pack.amax(wide, scale_inv.T.contiguous().T)
    expected = nvfp4_pack.pack(weight, scale_inv, amax=amax)
    assert_same_bytes(nvfp4_pack.pack(wide, scale_inv, amax=amax), expected)
    x = packing.dequantized(weight, scale_inv)
    assert_same_bytes(nvfp4_pack.pack(x.T.contiguous().T, amax=amax), expected)


@pytest.mark.parametrize(
    "block", [(128, 128), (1, 16), (64, 32), (7, 48), (13, 24), (3, 1), (500, 500)], ids=str
)
def test_blocks_of_other_sizes(backend: str, block: tuple[int, int]) -> None:
    """A block's edge may cut through a group of 16; the values are those of its own block all the same."""
    weight, scale_inv = packing.random_fp8(75, 208, block=block)
    x = packing.dequantized(weight, scale_inv, block)
    amax = nvfp4_pack.amax(weight, scale_inv, block=block)
    packed = nvfp4_pack.pack(weight, scale_inv, amax=amax, block=block)
    assert_same_bytes(packed, packing.modelopt_pack(x, x.abs().max()))
    assert nvfp4_pack.squared_error(weight, scale_inv, packed, block=block) == nvfp4_pack.squared_error(
        x, None, packed
    )


def test_backends_and_thread_counts_give_the_same_everything(
    monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    """Bytes, and the sums of squares to the last bit."""
    monkeypatch.setattr(native, "_BYTES_PER_THREAD", 1)  # so that small weights are cut too
    for weight, scale_inv in (packing.random_fp8(700, 304), (torch.randn(90, 112).bfloat16(), None)):
        results = []
        for backend in CPU_BACKENDS:
            monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference" if backend == "reference" else "")
            for num_threads in (1, 2, 3, 8):
                torch.set_num_threads(num_threads)
                amax = nvfp4_pack.amax(weight, scale_inv)
                packed = nvfp4_pack.pack(weight, scale_inv, amax=amax * 0.01)
                error = nvfp4_pack.squared_error(weight, scale_inv, packed)
                counts = nvfp4_pack.count_groups(weight, scale_inv, packed.weight_scale_2)
                same = packed._replace(weight=packed.weight.clone())
                assert nvfp4_pack.compare(weight, scale_inv, same) == (error, amax)
                results.append((packed, error, counts, amax.item()))
        for packed, *rest in results[1:]:
            assert_same_bytes(packed, results[0][0])
            assert rest == list(results[0][1:])


@pytest.mark.parametrize("block", [(128, 128), (1, 16), (300, 48), (13, 24)], ids=str)
def test_comparing_with_what_pack_gives(backend: str, block: tuple[int, int]) -> None:
    """With blocks of any size, rows that end within a stretch of 128, and a partner's larger maximum."""
    for N, K, partner in ((75, 208, 1.0), (300, 272, 3.7), (1, 16, 1.0)):
        weight, scale_inv = packing.random_fp8(N, K, block=block)
        amax = nvfp4_pack.amax(weight, scale_inv, block=block) * partner
        packed = nvfp4_pack.pack(weight, scale_inv, amax=amax, block=block)
        exact = nvfp4_pack.compare(weight, scale_inv, packed, block=block)
        assert exact is not None
        assert exact.error == nvfp4_pack.squared_error(weight, scale_inv, packed, block=block)
        assert torch.equal(exact.amax * partner, amax)
        assert exact == nvfp4_pack.compare(packing.dequantized(weight, scale_inv, block), None, packed)


@pytest.mark.parametrize("part", ["weight", "weight_scale"])
@pytest.mark.parametrize("at", [0, 77, -1])
def test_comparing_sees_every_bit(backend: str, part: str, at: int) -> None:
    for weight, scale_inv in (packing.random_fp8(141, 176), (torch.randn(141, 176).bfloat16(), None)):
        packed = nvfp4_pack.pack(weight, scale_inv, amax=nvfp4_pack.amax(weight, scale_inv))
        for bit in range(8):
            other = getattr(packed, part).clone()
            other.view(torch.uint8).view(-1)[at] ^= 1 << bit
            assert nvfp4_pack.compare(weight, scale_inv, packed._replace(**{part: other})) is None


def test_comparing_hard_weights(backend: str) -> None:
    """Every FP8 code under every maximum and block scale, to the last bit of the sums."""
    codes = packing.every_code_under_every_maximum()
    for scale in packing.block_scales():
        scale_inv = torch.full(packing.scale_grid(*codes.shape), scale)
        amax = nvfp4_pack.amax(codes, scale_inv)
        packed = nvfp4_pack.pack(codes, scale_inv, amax=amax)
        exact = nvfp4_pack.compare(codes, scale_inv, packed)
        assert exact == (nvfp4_pack.squared_error(codes, scale_inv, packed), amax)


def test_nan_is_equal_to_nothing(backend: str) -> None:
    weight, scale_inv = packing.random_fp8(32, 64)
    packed = nvfp4_pack.pack(weight, scale_inv, amax=nvfp4_pack.amax(weight, scale_inv))
    weight.view(torch.uint8)[31, 63] = 0x7F
    assert nvfp4_pack.compare(weight, scale_inv, packed) is None
    with pytest.raises(ValueError, match="out needs"):
        nvfp4_pack.compare(weight[:16], scale_inv, packed)


def test_a_busy_thread_keeps_its_work(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    monkeypatch.setattr(native, "_BYTES_PER_THREAD", 1)
    torch.set_num_threads(4)
    rows = lambda first, end: (first, end)  # noqa: E731
    with native.one_thread():
        assert native.over_rows(rows, 100, 1, 100) == [(0, 100)]
    assert len(native.over_rows(rows, 100, 1, 100)) == 4


def test_squared_error_is_the_error(backend: str) -> None:
    weight, scale_inv = packing.random_fp8(256, 512)
    packed = nvfp4_pack.pack(weight, scale_inv, amax=nvfp4_pack.amax(weight, scale_inv))
    error = nvfp4_pack.squared_error(weight, scale_inv, packed)
    x = packing.dequantized(weight, scale_inv).double()
    noise = (x - nvfp4_pack.unpack(packed).double()).square().sum().item()
    assert error.signal == pytest.approx(x.square().sum().item(), rel=1e-12)
    assert error.noise == pytest.approx(noise, rel=1e-12)
    assert error.sqnr_db > SQNR_NVFP4_WEIGHT_DB
    assert nvfp4_pack.SquaredError(1.0, 0.0).sqnr_db == math.inf


def test_flushing_subnormals_does_not_reach_the_core(threads: None) -> None:
    """A thread that flushes subnormal numbers to zero, as torch can be told to, packs tiny weights all the same."""
    if "cpu-native" not in CPU_BACKENDS:
        return  # the reference obeys the thread it runs in
    from m27quant.kernels.nvfp4_pack import cpu

    torch.set_num_threads(1)
    weight, scale_inv = packing.random_codes(64, 256), torch.tensor([[2.0**-123, 2.0**-131]])
    expected = nvfp4_pack.pack(weight, scale_inv, amax=nvfp4_pack.amax(weight, scale_inv))
    flushed: dict[str, tuple[Tensor, Tensor]] = {}

    def flush() -> None:
        if not torch.set_flush_denormal(True):
            return
        for name, module in (("cpu", cpu), ("reference", reference)):
            flushed[name] = torch.empty_like(expected.weight), torch.empty_like(expected.weight_scale)
            module.pack(weight, scale_inv, expected.weight_scale_2, BLOCK, *flushed[name])

    thread = threading.Thread(target=flush)
    thread.start()
    thread.join()
    if flushed:
        assert_same_bytes(flushed["cpu"], expected[:2])
        assert not torch.equal(flushed["reference"][0], expected.weight), "nothing was flushed: not a test"


def test_core_is_built_where_there_is_a_compiler() -> None:
    """Without this, a build that quietly fails would leave only the slow path tested."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler):
        assert native.load().error is None


def test_without_the_core_the_reference_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weight, scale_inv = packing.random_fp8(40, 48)
    expected = nvfp4_pack.pack(weight, scale_inv, amax=nvfp4_pack.amax(weight, scale_inv))
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    choice = dispatch.choose("nvfp4_pack", "cpu")
    assert choice == ("reference", "the compiled core was not built: it needs a C compiler at install time")
    assert_same_bytes(nvfp4_pack.pack(weight, scale_inv, amax=nvfp4_pack.amax(weight, scale_inv)), expected)
    (tmp_path / "core.abi3.so").write_bytes(b"not a library")
    assert dispatch.choose("nvfp4_pack", "cpu").reason.startswith("the compiled core cannot be loaded: ")
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        native.function("m27_pack_fp8")


def test_a_core_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if "cpu-native" in CPU_BACKENDS:
        built = native.ABI
        monkeypatch.setattr(native, "ABI", 10**6)
        error = native.load.__wrapped__().error
        assert error == f"the compiled core has version {built}, not 1000000: install again"


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert dispatch.choose("nvfp4_pack", "cuda:1") == ("reference", "M27QUANT_KERNELS=reference")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="M27QUANT_KERNELS may be 'reference' or unset"):
        dispatch.choose("nvfp4_pack", "cpu")
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE)
    assert dispatch.choose("fp8_dequant", "cuda") == ("reference", "plain torch on cuda")
    assert dispatch.choose("nvfp4_pack", "meta") == ("reference", "plain torch on meta")
