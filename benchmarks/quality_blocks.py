"""Every block's chosen scale against all 126 of them in F64, by code that shares nothing with the search."""

from __future__ import annotations

import torch
from torch import Tensor

from m27quant.kernels import fp8_dequant, nvfp4_pack
from m27quant.kernels.nvfp4_pack import PackedNVFP4, reference, scale_search
from tests.kernels.scale_cases import DISTRIBUTIONS, as_fp8

CHUNK = (512, 1024)
"""Rows and columns of what is compared with all scales at a time."""
E2M1 = torch.tensor(reference.E2M1_VALUES)


def exceptions_fp8(weight: Tensor, scale: Tensor, packed: PackedNVFP4) -> int:
    """Blocks with a better scale, by a table for each FP8 block: errors of 126 scales on 127 codes, times counts."""
    steps = scale_search.candidates(weight.device) * packed.weight_scale_2
    codes = weight.view(torch.uint8).long() & 127
    mine_NG = packed_errors(fp8_dequant.dequantize(weight, scale), packed)
    found = 0
    for i, j in [(i, j) for i in range(scale.shape[0]) for j in range(scale.shape[1])]:
        rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        x_C = (every * scale[i, j]).bfloat16().double()
        y_SV = (E2M1 * steps[:, None]).double()
        table_SC = (x_C[None, :, None] - y_SV[:, None, :]).square().amin(-1)
        groups = codes[rows, columns].reshape(-1, 16)
        counts_CB = torch.zeros(127, groups.shape[0], dtype=torch.float64)
        counts_CB.scatter_add_(0, groups.T, torch.ones(groups.T.shape, dtype=torch.float64))
        least_B = (table_SC @ counts_CB).amin(0)
        mine_B = mine_NG[rows, 8 * j : 8 * j + 8].flatten()
        found += int(
            (mine_B > least_B * (1 + 2.0**-20)).sum()
        )  # 2^-20: see tests/kernels/test_scale_search.py
    return found


def exceptions_bf16(x: Tensor, packed: PackedNVFP4) -> int:
    """The same for any values, by distances to all eight values under each scale."""
    x_NG16 = x.double().abs().view(x.shape[0], -1, 16)
    least = torch.full(x_NG16.shape[:2], torch.inf, dtype=torch.float64)
    for step in scale_search.candidates(x.device) * packed.weight_scale_2:
        terms = (x_NG16 - 0).square()
        for value in (E2M1[1:] * step).double():
            terms = torch.minimum(terms, (x_NG16 - value).square())
        least = torch.minimum(least, terms.sum(-1))
    return int((packed_errors(x, packed) > least * (1 + 2.0**-20)).sum())


def packed_errors(x: Tensor, packed: PackedNVFP4) -> Tensor:
    """F64 [N, G] of what was written."""
    N, G = packed.weight_scale.shape
    codes = torch.stack((packed.weight & 15, packed.weight >> 4), -1).view(N, G, 16)
    signed = torch.cat((E2M1, -E2M1))
    y = signed[codes.int()] * (packed.weight_scale.float() * packed.weight_scale_2)[..., None]
    return (x.double().view(N, G, 16) - y.double()).square().sum(-1)


def count_exceptions(blocks: int) -> dict[str, dict[str, int]]:
    """`blocks` blocks in equal parts of all distributions, one in 16 of them in BF16; half under a partner's amax."""
    result: dict[str, dict[str, int]] = {}
    each = blocks // len(DISTRIBUTIONS) + 1
    for kind, draw in DISTRIBUTIONS.items():
        generator = torch.Generator().manual_seed(len(kind))
        done = found = turn = 0
        while done < each:
            weight, scale = as_fp8(draw(generator, *CHUNK))
            amax = nvfp4_pack.amax(weight, scale) * (1.0, 1.37)[turn % 2]
            packed = nvfp4_pack.pack(weight, scale, amax=amax, scales="mse")
            found += exceptions_fp8(weight, scale, packed)
            x = draw(generator, CHUNK[0] // 16, CHUNK[1]).bfloat16()
            again = nvfp4_pack.pack(x, amax=nvfp4_pack.amax(x), scales="mse")
            found += exceptions_bf16(x, again)
            done += packed.weight_scale.numel() + again.weight_scale.numel()
            turn += 1
        result[kind] = {"blocks": done, "exceptions": found}
        print(f"  {kind:<18}{done:>12,} blocks, {found} with a better scale", flush=True)
    return result
