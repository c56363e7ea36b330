"""Block scales with the least squared error: no block has a better one, and every backend finds the same."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from m27quant.errors import CheckpointError
from m27quant.kernels import dispatch, native, nvfp4_pack
from m27quant.kernels.nvfp4_pack import PackedNVFP4
from tests.kernels import packing, scale_cases
from tests.kernels.packing import assert_same_bytes
from tests.kernels.scale_cases import DISTRIBUTIONS, Case, cases, extreme_cases
from tests.oracles import modelopt_sweep

compiled = pytest.mark.skipif(native.load().error is not None, reason=native.load().error or "")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def pack(case: Case, channel_weight: Tensor | None = None) -> PackedNVFP4:
    weight, scale_inv, amax, block = case
    return nvfp4_pack.pack(
        weight, scale_inv, amax=amax, block=block, scales="mse", channel_weight=channel_weight
    )


def by_reference(case: Case, channel_weight: Tensor | None = None) -> PackedNVFP4:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
        return pack(case, channel_weight)


def source(case: Case) -> Tensor:
    """BF16 values [N, K], not by the package."""
    weight, scale_inv, _, block = case
    return weight if scale_inv is None else packing.dequantized(weight, scale_inv, block)


def all_errors(x_NK: Tensor, weight_scale_2: Tensor, weight_K: Tensor | None = None) -> Tensor:
    """F64 [126, N, G]: the error of each scale in each group, with the nearest of all eight values, no rounding rule.

    Written down a second time: distances to all representable values instead of codes.
    """
    x_NG16 = x_NK.double().abs().view(x_NK.shape[0], -1, 16)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    errors = []
    for d in scales * weight_scale_2:
        values = (E2M1[:8] * d).double()
        terms = torch.stack([(x_NG16 - v).square() for v in values]).amin(0)
        if weight_K is not None:
            terms = terms * weight_K.double().view(-1, 16)
        errors.append(terms.sum(-1))
    return torch.stack(errors)


def packed_errors(x_NK: Tensor, packed: PackedNVFP4, weight_K: Tensor | None = None) -> Tensor:
    """F64 [N, G] of the bytes that were written, decoded here."""
    N, G = packed.weight_scale.shape
    codes = torch.stack((packed.weight & 15, packed.weight >> 4), -1).view(N, G, 16)
    d_NG = packed.weight_scale.float() * packed.weight_scale_2
    y = E2M1[codes.int()] * d_NG[..., None]
    terms = (x_NK.double().view(N, G, 16) - y.double()).square()
    return (terms if weight_K is None else terms * weight_K.double().view(-1, 16)).sum(-1)


def assert_least(case: Case, packed: PackedNVFP4, weight_K: Tensor | None = None) -> None:
    """Against an exhaustive search in F64 that shares no code: equal but for the order of 16 additions.

    The nearest value by F64 distance may be another than the one that F32 division rounds to, on the middle between
    two: it is then nearer by 2^-23 of the distance at most.
    """
    x = source(case)
    mine = packed_errors(x, packed, weight_K)
    least = all_errors(x, packed.weight_scale_2, weight_K).amin(0)
    assert bool((mine <= least * (1 + 2.0**-20)).all()), (
        f"{int((mine > least * (1 + 2.0**-20)).sum())} blocks"
    )


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_no_block_has_a_better_scale(kind: str) -> None:
    for case in cases(kind, 128, 128):
        packed = pack(case)
        assert_least(case, packed)
        assert_same_bytes(packed, by_reference(case))


def test_at_the_ends_of_the_formats() -> None:
    for case in extreme_cases():
        assert_same_bytes(pack(case), by_reference(case))
    assert_least(case, pack(case))


@pytest.mark.parametrize("kind", ["normal", "on the grid", "wide range"])
def test_weighted(kind: str) -> None:
    g = torch.Generator().manual_seed(3)
    turn = itertools.cycle(("smooth", "spread", "with zeros"))
    weights = {
        "smooth": torch.rand(128, generator=g) + 0.1,
        "spread": torch.exp2(torch.randint(-60, 60, (128,), generator=g)),
        "with zeros": torch.rand(128, generator=g) * (torch.rand(128, generator=g) < 0.5),
    }
    for case in cases(kind, 128, 128):
        weight_K = weights[next(turn)]
        packed = pack(case, weight_K)
        assert_same_bytes(packed, by_reference(case, weight_K))
        assert_least(case, packed, weight_K)


def test_weights_that_say_nothing() -> None:
    """All ones are no weights; so is a group of zeros; a power of two changes nothing."""
    case = next(cases("normal", 128, 256))
    plain = pack(case)
    assert_same_bytes(pack(case, torch.ones(256)), plain)
    assert_same_bytes(pack(case, torch.zeros(256)), plain)
    g = torch.Generator().manual_seed(1)
    weight_K = torch.rand(256, generator=g)
    assert_same_bytes(pack(case, weight_K * 2.0**-40), pack(case, weight_K))
    assert not torch.equal(
        pack(case, weight_K).weight_scale.view(torch.uint8), plain.weight_scale.view(torch.uint8)
    )


def test_of_equal_errors_the_smallest_scale() -> None:
    """6 under scale 1 is 3 under scale 2, and zeros are zeros under any: modelopt's sweep takes the first too."""
    row = torch.zeros(1, 48)
    row[0, 16], row[0, 32:] = 6.0, 1.5
    packed = nvfp4_pack.pack(row.bfloat16(), amax=torch.tensor(2688.0), scales="mse")
    assert packed.weight_scale.float().tolist() == [[2.0**-9, 1.0, 0.25]]


@compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_pieces_do_not_matter(threads: int) -> None:
    before = torch.get_num_threads()
    weight, scale = scale_cases.as_fp8(
        scale_cases.DISTRIBUTIONS["student"](torch.Generator().manual_seed(2), 1280, 1024)
    )
    try:
        torch.set_num_threads(threads)
        packed = nvfp4_pack.pack(weight, scale, amax=nvfp4_pack.amax(weight, scale), scales="mse")
    finally:
        torch.set_num_threads(before)
    x = packing.dequantized(weight, scale)
    assert_same_bytes(packed, nvfp4_pack.pack(x, amax=x.abs().max().float(), scales="mse"))


@pytest.mark.parametrize("kind", ["student", "wide range"])
def test_total_error_is_at_most_modelopts(kind: str) -> None:
    """modelopt's NVFP4MSECalibrator and its export on the same tensor; more error than max calibration in neither."""
    for weight, scale_inv, amax, block in cases(kind, 128, 128):
        x = source((weight, scale_inv, amax, block))
        if amax < x.abs().max():
            continue  # no maximum of modelopt's is smaller
        theirs = PackedNVFP4(*modelopt_sweep.pack(x, amax))
        mine = pack((weight, scale_inv, amax, block))
        assert mine.weight_scale_2 == theirs.weight_scale_2
        error, their_error = packed_errors(x, mine), packed_errors(x, theirs)
        assert bool((error <= their_error * (1 + 2.0**-20)).all())
        assert float(error.sum()) <= float(their_error.sum())
        largest = nvfp4_pack.pack(weight, scale_inv, amax=amax, block=block)
        assert float(error.sum()) <= nvfp4_pack.squared_error(x, None, largest).noise


def test_compare_knows_the_choice() -> None:
    for weight, scale_inv, amax, block in (*cases("normal", 128, 128),):
        if amax < nvfp4_pack.amax(weight, scale_inv):
            continue
        largest = nvfp4_pack.pack(weight, scale_inv, amax=amax, block=block)
        best = nvfp4_pack.pack(weight, scale_inv, amax=amax, block=block, scales="mse")
        found = nvfp4_pack.compare(weight, scale_inv, best, block=block, scales="mse")
        assert found is not None
        assert found.error == nvfp4_pack.squared_error(weight, scale_inv, best)
        parts = nvfp4_pack.group_errors(weight, scale_inv, best, block=block)
        assert math.isclose(float(parts.sum()), found.error.noise, rel_tol=1e-12)
        assert nvfp4_pack.compare(weight, scale_inv, largest, block=block, scales="mse") is None
        assert nvfp4_pack.compare(weight, scale_inv, best, block=block) is None


def test_refused() -> None:
    x, amax = torch.randn(4, 32).bfloat16(), torch.tensor(4.0)
    bad = torch.full((32,), 1.0)
    bad[3] = math.nan
    for channel in (bad, -torch.ones(32), torch.ones(16), torch.ones(32, dtype=torch.float64)):
        with pytest.raises(ValueError, match="channel_weight must be"):
            nvfp4_pack.pack(x, amax=amax, scales="mse", channel_weight=channel)
    with pytest.raises(ValueError, match="goes with"):
        nvfp4_pack.pack(x, amax=amax, channel_weight=torch.ones(32))
    x[2, 17] = math.inf
    with pytest.raises(CheckpointError, match="row 2, column 17"):
        nvfp4_pack.pack(x, amax=amax, scales="mse")
    weight, scale = packing.random_fp8(128, 256)
    weight.view(torch.uint8)[77, 200] = 0xFF
    with pytest.raises(CheckpointError, match="row 77, column 200"):
        nvfp4_pack.pack(weight, scale, amax=amax, scales="mse")
