"""Error feedback: every byte is what GPTQ asks for, the outputs gain, and bad Hessians are damped or refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from m27quant.errors import CalibrationError, CheckpointError
from m27quant.kernels import dispatch, native, nvfp4_gptq, nvfp4_pack
from m27quant.kernels.nvfp4_gptq import decomposition
from m27quant.kernels.nvfp4_pack import PackedNVFP4
from tests.kernels import gptq_oracle, packing
from tests.kernels.packing import assert_same_bytes
from tests.tolerance import F32_FEEDBACK

N, K = 40, 96
compiled = pytest.mark.skipif(native.load().error is not None, reason=native.load().error or "")


def weights(seed: int = 1, rows: int = N, columns: int = K) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=g) * 0.02).bfloat16()


def hessian(tokens: int = 400, rank: int | None = None) -> Tensor:
    x = gptq_oracle.correlated_inputs(K, tokens, rank=rank)
    return x.T @ x


def pack(x: Tensor, H: Tensor, damping: float = 0.01) -> PackedNVFP4:
    return nvfp4_gptq.pack(x, amax=nvfp4_pack.amax(x), factor=nvfp4_gptq.factorize(H, damping=damping))


def assert_as_gptq_asks(x: Tensor, packed: PackedNVFP4, H: Tensor) -> None:
    """Given what came before, each code is the nearest to the oracle's weight and each scale the best, up to F32.

    The chain of decisions is followed as `packed` took it, so that one near tie cannot hide all that comes after.
    """
    at_turn, at_group, weight_K = gptq_oracle.updated_weights(x, packed, H)
    size = at_turn.abs().amax()
    step = (packed.weight_scale.float() * packed.weight_scale_2).double().repeat_interleave(16, 1)
    values = gptq_oracle.E2M1.double()
    nearest = (at_turn[..., None] - step[..., None] * values).abs().amin(-1)
    mine = (at_turn - gptq_oracle.unpacked(packed).double()).abs()
    assert float((mine - nearest).max()) <= F32_FEEDBACK * float(size)

    weight_G16 = weight_K.view(-1, 16)
    x_RG16 = at_group.view(len(x), -1, 16)
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * packed.weight_scale_2
    errors = torch.stack([_nearest_error(x_RG16, d.double(), weight_G16) for d in every])
    chosen = _nearest_error(x_RG16, step.view(x_RG16.shape)[..., :1], weight_G16)
    slack = F32_FEEDBACK * float(size) ** 2 * weight_G16.sum(-1)
    assert bool((chosen <= errors.amin(0) + slack).all())


def _nearest_error(x_RG16: Tensor, d: Tensor, weight_G16: Tensor) -> Tensor:
    terms = (x_RG16[..., None] - d[..., None] * gptq_oracle.E2M1.double()).square().amin(-1)
    return (terms * weight_G16).sum(-1)


@pytest.mark.parametrize("rank", [K, 12], ids=["full rank", "rank 12"])
def test_every_choice_is_gptqs(rank: int) -> None:
    x, H = weights(), hessian(rank=rank)
    packed = pack(x, H)
    assert_as_gptq_asks(x, packed, gptq_oracle.damped(H, 0.01))
    damaged = packed._replace(weight=packed.weight.clone())
    damaged.weight[3, 20] ^= 1
    with pytest.raises(AssertionError):
        assert_as_gptq_asks(x, damaged, gptq_oracle.damped(H, 0.01))


def test_outputs_gain_over_weighted_search() -> None:
    x, H = weights(), hessian()
    amax = nvfp4_pack.amax(x)
    largest = nvfp4_pack.pack(x, amax=amax)
    weighted = nvfp4_pack.pack(x, amax=amax, scales="mse", channel_weight=H.diagonal().float())
    error = [gptq_oracle.output_error(x, p, H) for p in (pack(x, H), weighted, largest)]
    assert error[0] < 0.7 * error[1]
    assert error[1] < error[2]


def test_the_least_error_recipe_where_channels_are_alike() -> None:
    """An identity, and inputs that were never seen, ask for least squares: the same bytes as scales="mse"."""
    x = weights()
    plain = nvfp4_pack.pack(x, amax=nvfp4_pack.amax(x), scales="mse")
    for H in (torch.eye(K) * 7.3, torch.zeros(K, K)):
        assert_same_bytes(pack(x, H), plain)
    assert nvfp4_gptq.factorize(torch.zeros(K, K)).dead == K


def test_channels_never_seen() -> None:
    x, H = weights(), hessian()
    dead = torch.tensor([0, 5, 16, 17, 18, 95])
    H[dead] = H[:, dead] = 0
    factor = nvfp4_gptq.factorize(H)
    assert (factor.dead, factor.attempts) == (6, 1)
    packed = pack(x, H)
    assert_as_gptq_asks(x, packed, gptq_oracle.damped(H, 0.01))
    step = (packed.weight_scale.float() * packed.weight_scale_2).repeat_interleave(16, 1)
    plainly = nvfp4_pack.reference.encode(
        x.float().view(N, -1, 16), packed.weight_scale, packed.weight_scale_2
    )
    for k in dead.tolist():
        shift = 4 * (k % 2)
        assert torch.equal(packed.weight[:, k // 2] >> shift & 15, plainly[:, k // 2] >> shift & 15), k
    assert bool((step > 0).all())


def test_energy_is_the_damped_output_error() -> None:
    x, H = weights(), hessian()
    packed, factor = pack(x, H), nvfp4_gptq.factorize(H)
    H = gptq_oracle.damped(H, 0.01)
    error = x.float() - gptq_oracle.unpacked(packed)
    assert nvfp4_gptq.energy(error, factor) == pytest.approx(gptq_oracle.output_error(x, packed, H), rel=1e-5)
    signal = float(((x.double() @ H) * x.double()).sum())
    assert nvfp4_gptq.energy(x, factor) == pytest.approx(signal, rel=1e-5)


def test_fp8_blocks_are_their_bf16_values() -> None:
    weight, scale_inv = packing.random_fp8(N, K)
    x = packing.dequantized(weight, scale_inv)
    factor, amax = nvfp4_gptq.factorize(hessian()), nvfp4_pack.amax(weight, scale_inv)
    codes, scale = torch.zeros(N, K // 2, dtype=torch.uint8), torch.zeros(N, K // 16).to(torch.float8_e4m3fn)
    packed = nvfp4_gptq.pack(weight, scale_inv, amax=amax, factor=factor, out=(codes, scale))
    assert packed.weight is codes
    assert packed.weight_scale is scale
    assert_same_bytes(packed, nvfp4_gptq.pack(x, amax=amax, factor=factor))


@compiled
@pytest.mark.parametrize("spread", [1.0, 1e-36, 3e35])
def test_the_core_and_the_reference_agree_to_the_bit(spread: float) -> None:
    x, H = weights(rows=37) * spread, hessian(rank=30)
    x[5, 16:48] = 0
    amax = nvfp4_pack.amax(x)
    found = []
    for choice in ("", "reference"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(dispatch.ENVIRONMENT_VARIABLE, choice)
            factor = nvfp4_gptq.factorize(H)
            packed = [nvfp4_gptq.pack(x, amax=amax * clip, factor=factor) for clip in (1.0, 0.03)]
            found.append((*factor[:3], *packed[0], *packed[1], torch.tensor(nvfp4_gptq.energy(x, factor))))
    assert_same_bytes(*found)


@compiled
def test_panels_of_the_factor() -> None:
    """More rows than one panel, a last panel that is not full, and a pivot that fails in it."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(208, 208, generator=g, dtype=torch.float64)
    a = a @ a.T + torch.eye(208, dtype=torch.float64)
    for broken in (False, True):
        if broken:
            a[200, 200] = 0
        mine, reference = a.clone(), a.clone()
        done = native.function("m27_cholesky")(mine.data_ptr(), 208, 0.5)
        assert done == decomposition.cholesky(reference, 0.5) == (not broken)
        if not broken:
            assert torch.equal(mine.triu(), reference.triu())
            assert torch.allclose(mine.triu(), torch.linalg.cholesky(a, upper=True), rtol=1e-9, atol=1e-9)


@compiled
def test_threads_do_not_matter() -> None:
    x, factor = weights(rows=100), nvfp4_gptq.factorize(hessian())
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_BYTES_PER_THREAD", 1)
        try:
            packed = [_on(threads, x, factor) for threads in (1, 3)]
        finally:
            torch.set_num_threads(before)
    assert_same_bytes(*packed)


def _on(threads: int, x: Tensor, factor: nvfp4_gptq.Factor) -> PackedNVFP4:
    torch.set_num_threads(threads)
    return nvfp4_gptq.pack(x, amax=nvfp4_pack.amax(x), factor=factor)


def test_rows_do_not_depend_on_each_other() -> None:
    x, factor = weights(), nvfp4_gptq.factorize(hessian())
    amax = nvfp4_pack.amax(x)
    whole = nvfp4_gptq.pack(x, amax=amax, factor=factor)
    for rows in (slice(0, 7), slice(7, 24), slice(39, 40)):
        part = nvfp4_gptq.pack(x[rows].contiguous(), amax=amax, factor=factor)
        assert_same_bytes(
            part, whole._replace(weight=whole.weight[rows], weight_scale=whole.weight_scale[rows])
        )


def test_damping_grows_until_it_factorizes() -> None:
    H = hessian()
    assert nvfp4_gptq.factorize(H)[3:] == (0.01, 1, 0)
    apart = H - 0.8 * torch.diag(H.diagonal())  # some eigenvalues are negative: 0.01 and 0.1 are too little
    factor = nvfp4_gptq.factorize(apart)
    assert factor.attempts > 1
    assert factor.damping == pytest.approx(0.01 * 10 ** (factor.attempts - 1))
    assert bool((factor.pivots > 0).all())
    singular = hessian(rank=12)
    assert nvfp4_gptq.factorize(singular).attempts == 1
    again = nvfp4_gptq.factorize(singular.triu() + torch.full((K, K), math.nan).tril(-1))
    assert torch.equal(
        again.coupling, nvfp4_gptq.factorize(singular).coupling
    )  # only the upper triangle is read


def test_refused() -> None:
    x, H = weights(), hessian()
    for value, word in ((math.nan, "2 sums"), (math.inf, "2 sums"), (-1e30, "negative")):
        bad = H.clone()
        bad[3, 3] = bad[5, 9] = value
        with pytest.raises(CalibrationError, match=word):
            nvfp4_gptq.factorize(bad)
    huge = torch.zeros(K, K)
    huge[0, 1] = huge[1, 0] = 1e30
    with pytest.raises(CalibrationError, match="no sum of squares"):
        nvfp4_gptq.factorize(huge)
    for wrong in (H[:, :80], H[:95, :95], H.half(), H[0]):
        with pytest.raises(ValueError, match="hessian"):
            nvfp4_gptq.factorize(wrong)
    with pytest.raises(ValueError, match="damping"):
        nvfp4_gptq.factorize(H, damping=math.nan)
    factor = nvfp4_gptq.factorize(H)
    with pytest.raises(ValueError, match="channels"):
        nvfp4_gptq.pack(weights(columns=80), amax=torch.tensor(1.0), factor=factor)
    with pytest.raises(CalibrationError, match="96 channels overflows F32"):
        nvfp4_gptq.pack(x, amax=nvfp4_pack.amax(x), factor=factor._replace(coupling=factor.coupling * 1e38))
    x[7, 50] = math.inf
    with pytest.raises(CheckpointError, match="row 7, column 50"):
        nvfp4_gptq.pack(x, amax=torch.tensor(1.0), factor=factor)
