"""Keys and values into a paged cache on a CPU: every code, rounding, saturation, slots that are left out."""

from __future__ import annotations

import pytest
import torch

from m27quant.kernels import native
from m27quant.kernels.fp8_kv_attention import write_kv
from m27quant.runtime.streamed import fake_quantize_fp8
from tests.kernels.poison import poisoned  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("poisoned")

FP8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32


@pytest.fixture(params=["core", "reference"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setenv("M27QUANT_KERNELS", "reference")
    elif error := native.load().error:
        pytest.skip(error)
    return str(request.param)


def codes_of(x_TC: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The bytes [T, C] that rows become in an FP8 cache."""
    T, C = x_TC.shape
    k_cache, v_cache = torch.zeros(2, T, 1, 1, C).to(FP8)
    s = torch.tensor(scale)
    write_kv(x_TC[:, None], -x_TC[:, None], k_cache, v_cache, torch.arange(T), s, s)
    codes = k_cache.view(torch.uint8).flatten(1)
    number = ~x_TC.isnan()
    assert torch.equal((codes ^ 0x80)[number], v_cache.view(torch.uint8).flatten(1)[number])
    return codes


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 2.0**9])
def test_every_code_comes_back(dtype: torch.dtype, scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = (codes.view(FP8).float() * scale).to(dtype)[None]
    finite = values[0].isfinite()
    assert int(finite.sum()) == 254
    assert torch.equal(codes_of(values, scale)[0][finite], codes[finite])


def test_ties_go_to_the_even_code_and_large_numbers_saturate() -> None:
    magnitudes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    even = torch.arange(126) + torch.arange(126) % 2
    assert torch.equal(codes_of(middle[None])[0].long(), even)
    below, above = (torch.nextafter(middle, torch.tensor(to)) for to in (0.0, torch.inf))
    assert torch.equal(codes_of(below[None])[0].long(), torch.arange(126))
    assert torch.equal(codes_of(above[None])[0].long(), torch.arange(1, 127))
    large = torch.tensor(
        [[448.0, 463.9, 464.0, 1e6, 3e38, torch.inf, -449.0, -torch.inf, 0.0, -0.0, 1e-40, -1e-40]]
    )
    assert codes_of(large).tolist() == [[126] * 6 + [254] * 2 + [0, 128, 0, 128]]
    assert (codes_of(torch.tensor([[torch.nan]])) & 0x7F).tolist() == [[127]]


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rounding_is_torchs(dtype: torch.dtype) -> None:
    """Any bits: what torch.float8_e4m3fn makes of x / scale, within its range."""
    bits = torch.randint(-(2**31), 2**31, (64, 1024)).int()
    x = bits.view(F32).to(dtype)
    x[x.isnan()] = 1.0
    for scale in (1.0, 0.0123, 7e-20, 3e20):
        expected = (x.float() / torch.tensor(scale)).clamp(-448, 448).to(FP8)
        assert torch.equal(codes_of(x, scale), expected.view(torch.uint8))


def test_what_attention_reads_is_what_the_streamed_model_rounds_to() -> None:
    k, scale = torch.randn(50, 64).bfloat16(), torch.tensor(0.0117)
    read = (codes_of(k, float(scale)).view(FP8).float() * scale).bfloat16()
    assert torch.equal(read, fake_quantize_fp8(k, scale))


@pytest.mark.parametrize("cache_dtype", [FP8, BF16, F32])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_slots(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    T, J, C = 9, 2, 24
    wide = torch.randn(2, T, 3 * J * C).to(dtype)
    k, v = (x[:, J * C : 2 * J * C].unflatten(1, (J, C)) for x in wide)  # parts of one projection
    k_cache, v_cache = torch.full((2, 5, 4, J, C), torch.nan).to(cache_dtype)
    slots = torch.tensor([7, -1, 0, 19, 3, -1, 12, 11, 4])
    s_k, s_v = torch.tensor(0.02), torch.tensor(0.03)
    write_kv(k, v, k_cache, v_cache, slots, s_k, s_v)
    for x, cache, scale in ((k, k_cache, s_k), (v, v_cache, s_v)):
        flat = cache.flatten(0, 1)
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                want = (x[t].float() / scale).clamp(-448, 448) if cache_dtype == FP8 else x[t]
                assert torch.equal(flat[slot].view(torch.uint8), want.to(cache_dtype).view(torch.uint8))
        untouched = torch.ones(20, dtype=torch.bool)
        untouched[slots[slots >= 0]] = False
        assert flat.float()[untouched].isnan().all()


def test_nothing_to_write_and_what_is_refused() -> None:
    k_cache, v_cache = torch.zeros(2, 5, 4, 2, 8)
    one, k = torch.tensor(1.0), torch.zeros(3, 2, 8)
    write_kv(k[:0], k[:0], k_cache, v_cache, torch.zeros(0, dtype=torch.int64), one, one)
    for slots in ([0, 1, 20], [0, -2, 1]):
        with pytest.raises(ValueError, match="slots holds"):
            write_kv(k + 1, k + 1, k_cache, v_cache, torch.tensor(slots), one, one)
        assert (k_cache == 0).all(), "nothing is written then"
    with pytest.raises(ValueError, match="k must be"):
        write_kv(k[:, :1], k, k_cache, v_cache, torch.arange(3), one, one)
    with pytest.raises(ValueError, match="slots must be int64"):
        write_kv(k, k, k_cache, v_cache, torch.arange(3, dtype=torch.int32), one, one)
    with pytest.raises(ValueError, match="v_scale must be positive"):
        write_kv(k, k, k_cache, v_cache, torch.arange(3), one, -one)
