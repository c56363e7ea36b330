"""NVFP4 packing in Triton: the bytes of `reference` on CUDA.

Equal by construction: every float step is one correctly rounded operation (`tl.div_rn`, no fusion to FMA),
FP8 is decoded and BF16, E4M3 and E2M1 are rounded by integers, and maxima do not depend on order.
Compile with `enable_fp_fusion=False`, as `OPTIONS` does.

In the kernels: b_ a tile, o_ offsets, m_ a mask; BN rows, BG groups of 16 columns in a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m27quant.kernels.nvfp4_pack import reference, scale_search
from m27quant.kernels.nvfp4_pack.reference import GROUP

TILE = {"BN": 16, "BG": 8}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _load_tile(
    weight,
    scale_inv,
    N,
    K,
    J,
    block_n,
    block_k,
    o_n,
    o_g,
    FP8: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
):
    """BF16 magnitudes as F32 bits and signs (0 or 1), int32 [BN, BG, 16]; zero outside the weight."""
    G = K // 16
    m_ng = (o_n < N)[:, None] & (o_g < G)[None, :]
    o_ng = o_n[:, None] * G + o_g[None, :]  # int64
    o_nk = o_ng[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    b_w = tl.load(weight + o_nk, mask=m_ng[:, :, None], other=0).to(tl.int32)
    if not FP8:
        return (b_w & 0x7FFF) << 16, (b_w >> 15) & 1
    o_scale = (o_n // block_n)[:, None] * J + ((o_g * 16) // block_k)[None, :]
    b_scale = tl.load(scale_inv + o_scale, mask=m_ng, other=0.0)
    b_c = b_w & 0x7F
    b_normal = ((b_c << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    b_value = tl.where(b_c < 8, b_c.to(tl.float32) * 0.001953125, b_normal)  # 2**-9
    b_bits = (b_value * tl.abs(b_scale)[:, :, None]).to(tl.int32, bitcast=True)
    b_bits = ((b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16) << 16  # to BF16, ties to even
    return tl.where(b_c == 0x7F, 0x7FC00000, b_bits), b_w >> 7


@triton.jit
def nvfp4_amax_kernel(
    weight, scale_inv, most, N, K, J, block_n, block_k, FP8: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr
):
    """`most` int32 []: raised to the F32 bits of the largest magnitude, where NaN lies above Inf."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_g = tl.program_id(1) * BG + tl.arange(0, BG)
    b_bits, _ = _load_tile(weight, scale_inv, N, K, J, block_n, block_k, o_n, o_g, FP8, BN, BG)
    tl.atomic_max(most, tl.max(tl.max(tl.max(b_bits, axis=2), axis=1), axis=0))


@triton.jit
def nvfp4_pack_kernel(
    weight, scale_inv, weight_scale_2, codes, scales, nonfinite,
    N, K, J, block_n, block_k, FP8: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """`codes` U8 [N, K/2], `scales` U8 [N, K/16] (E4M3 bits); `nonfinite` int32 [] becomes 1 at a NaN or Inf."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_g = tl.program_id(1) * BG + tl.arange(0, BG)
    b_bits, b_sign = _load_tile(weight, scale_inv, N, K, J, block_n, block_k, o_n, o_g, FP8, BN, BG)
    b_most = tl.max(b_bits, axis=2)
    tl.store(nonfinite, 1, mask=tl.max(tl.max(b_most, axis=1), axis=0) >= 0x7F800000)

    ws2 = tl.load(weight_scale_2)
    b_s = tl.div_rn(b_most.to(tl.float32, bitcast=True), tl.zeros_like(b_most).to(tl.float32) + 6.0 * ws2)
    b_s = tl.where(b_s == 0.0, 1.0, b_s)
    b_s = tl.where(b_s < 0.001953125, 0.001953125, b_s)
    b_s = tl.where(b_s > 448.0, 448.0, b_s)
    b_u = b_s.to(tl.int32, bitcast=True)
    b_small = (b_s + 16384.0).to(
        tl.int32, bitcast=True
    ) - 0x46800000  # below 2**-6: the ulp of 2**14 is 2**-9
    b_large = (b_u + 0x7FFFF + ((b_u >> 20) & 1) - 0x3C000000) >> 20
    b_e4m3 = tl.where(b_s < 0.015625, b_small, b_large)
    _store_tile(b_bits, b_sign, b_e4m3, ws2, codes, scales, N, K, o_n, o_g, BN, BG)


@triton.jit
def _store_tile(
    b_bits, b_sign, b_e4m3, ws2, codes, scales, N, K, o_n, o_g, BN: tl.constexpr, BG: tl.constexpr
):
    """Block scales, and the codes that magnitudes have under them."""
    b_normal = ((b_e4m3 << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    b_d = tl.where(b_e4m3 < 8, b_e4m3.to(tl.float32) * 0.001953125, b_normal) * ws2

    b_y = tl.div_rn(b_bits.to(tl.float32, bitcast=True), tl.broadcast_to(b_d[:, :, None], (BN, BG, 16)))
    b_code = (b_y > 0.25).to(tl.int32) + (b_y >= 0.75).to(tl.int32) + (b_y > 1.25).to(tl.int32)
    b_code += (b_y >= 1.75).to(tl.int32) + (b_y > 2.5).to(tl.int32) + (b_y >= 3.5).to(tl.int32)
    b_code += (b_y > 5.0).to(tl.int32)
    b_code |= (b_sign & (b_y > 0.0).to(tl.int32)) << 3
    b_low, b_high = tl.split(tl.reshape(b_code, (BN, BG, 8, 2)))

    m_ng = (o_n < N)[:, None] & (o_g < K // 16)[None, :]
    o_ng = o_n[:, None] * (K // 16) + o_g[None, :]
    tl.store(scales + o_ng, b_e4m3.to(tl.uint8), mask=m_ng)
    o_byte = o_ng[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    tl.store(codes + o_byte, (b_low | (b_high << 4)).to(tl.uint8), mask=m_ng[:, :, None])


@triton.jit
def nvfp4_search_kernel(
    weight, scale_inv, weight_scale_2, candidates, channel, codes, scales, nonfinite,
    N, K, J, block_n, block_k, WEIGHTED: tl.constexpr, FP8: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """As `nvfp4_pack_kernel`, under the scales of `scale_search`: all of them are tried, in F64 as it says.

    `candidates` F32 [126], `channel` F32 [K] where WEIGHTED.
    """
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_g = tl.program_id(1) * BG + tl.arange(0, BG)
    b_bits, b_sign = _load_tile(weight, scale_inv, N, K, J, block_n, block_k, o_n, o_g, FP8, BN, BG)
    b_most = tl.max(tl.max(tl.max(b_bits, axis=2), axis=1), axis=0)
    tl.store(nonfinite, 1, mask=b_most >= 0x7F800000)

    ws2 = tl.load(weight_scale_2)
    b_x = b_bits.to(tl.float32, bitcast=True)
    if WEIGHTED:
        o_k = o_g[:, None] * 16 + tl.arange(0, 16)[None, :]
        b_w = tl.load(channel + o_k, mask=o_k < K, other=0.0).to(tl.float64)[None, :, :]
    b_least = tl.full((BN, BG), float("inf"), tl.float64)
    b_e4m3 = tl.full((BN, BG), 1, tl.int32)
    for index in range(126):
        d = tl.load(candidates + index) * ws2
        b_a = tl.div_rn(b_x, tl.zeros_like(b_x) + d)
        b_r = b_x.to(tl.float64) - (rounded(b_a) * d).to(tl.float64)
        b_r = b_r * b_r
        if WEIGHTED:
            b_r = b_r * b_w
        b_error = halved(b_r, BN, BG)
        b_better = b_error < b_least
        b_least = tl.where(b_better, b_error, b_least)
        b_e4m3 = tl.where(b_better, index + 1, b_e4m3)
    _store_tile(b_bits, b_sign, b_e4m3, ws2, codes, scales, N, K, o_n, o_g, BN, BG)


@triton.jit
def rounded(b_a):
    """E2M1 values of non-negative numbers."""
    b_q = tl.where(b_a > 0.25, 0.5, 0.0) + tl.where(b_a >= 0.75, 0.5, 0.0)
    b_q += tl.where(b_a > 1.25, 0.5, 0.0) + tl.where(b_a >= 1.75, 0.5, 0.0)
    b_q += tl.where(b_a > 2.5, 1.0, 0.0) + tl.where(b_a >= 3.5, 1.0, 0.0)
    return b_q + tl.where(b_a > 5.0, 2.0, 0.0)


@triton.jit
def halved(b_v, BN: tl.constexpr, BG: tl.constexpr):
    """[BN, BG, 16] to [BN, BG]: lane j adds lane j + 8, j + 4, j + 2, j + 1."""
    b_l, b_h = tl.split(tl.permute(tl.reshape(b_v, (BN, BG, 2, 8)), (0, 1, 3, 2)))
    b_l, b_h = tl.split(tl.permute(tl.reshape(b_l + b_h, (BN, BG, 2, 4)), (0, 1, 3, 2)))
    b_l, b_h = tl.split(tl.permute(tl.reshape(b_l + b_h, (BN, BG, 2, 2)), (0, 1, 3, 2)))
    b_l, b_h = tl.split(b_l + b_h)
    return b_l + b_h


def amax(weight_NK: Tensor, scale_inv_IJ: Tensor | None, block: tuple[int, int]) -> Tensor:
    """See `reference.amax`."""
    arguments, grid = _launch(weight_NK, scale_inv_IJ, block)
    most = torch.zeros((), dtype=torch.int32, device=weight_NK.device)
    nvfp4_amax_kernel[grid](*arguments[:2], most, *arguments[2:], **TILE, **OPTIONS)
    return most.view(torch.float32)


def pack(
    weight_NK: Tensor,
    scale_inv_IJ: Tensor | None,
    weight_scale_2: Tensor,
    block: tuple[int, int],
    out_codes_NK2: Tensor,
    out_scale_NG: Tensor,
) -> bool:
    """See `reference.pack`."""
    arguments, grid = _launch(weight_NK, scale_inv_IJ, block)
    nonfinite = torch.zeros((), dtype=torch.int32, device=weight_NK.device)
    outputs = (weight_scale_2, out_codes_NK2, out_scale_NG.view(torch.uint8), nonfinite)
    nvfp4_pack_kernel[grid](*arguments[:2], *outputs, *arguments[2:], **TILE, **OPTIONS)
    return not int(nonfinite)


def pack_least_error(
    weight_NK: Tensor,
    scale_inv_IJ: Tensor | None,
    weight_scale_2: Tensor,
    block: tuple[int, int],
    channel_weight_K: Tensor | None,
    out_codes_NK2: Tensor,
    out_scale_NG: Tensor,
) -> bool:
    """See `scale_search.pack`."""
    arguments, grid = _launch(weight_NK, scale_inv_IJ, block)
    nonfinite = torch.zeros((), dtype=torch.int32, device=weight_NK.device)
    candidates = scale_search.candidates(weight_NK.device)
    weighted = channel_weight_K is not None
    channel = candidates if channel_weight_K is None else channel_weight_K  # a pointer never read
    outputs = (out_codes_NK2, out_scale_NG.view(torch.uint8), nonfinite)
    inputs = (*arguments[:2], weight_scale_2, candidates, channel)
    nvfp4_search_kernel[grid](*inputs, *outputs, *arguments[2:7], weighted, arguments[7], **TILE, **OPTIONS)
    return not int(nonfinite)


def row_errors(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, packed: Sequence[Tensor], block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """See `reference.row_errors`; CUDA adds in another order, so the last digits may differ from a CPU's."""
    return reference.row_errors(weight_NK, scale_inv_IJ, packed, block)


def exact_row_errors(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, packed: Sequence[Tensor], block: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """See `reference.exact_row_errors`; sums as in `row_errors`."""
    return reference.exact_row_errors(weight_NK, scale_inv_IJ, packed, block)


def count_groups(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, weight_scale_2: Tensor, block: tuple[int, int]
) -> tuple[int, int, int]:
    """See `reference.count_groups`."""
    return reference.count_groups(weight_NK, scale_inv_IJ, weight_scale_2, block)


def _launch(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, block: tuple[int, int]
) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """What both kernels are called with (weight, scales, sizes, format) and the grid."""
    N, K = weight_NK.shape
    if scale_inv_IJ is not None and block[1] % GROUP:  # a block's edge cuts through a group of 16
        weight_NK, scale_inv_IJ = reference.bf16_rows(weight_NK, scale_inv_IJ, slice(0, N), block), None
    weight_NK = weight_NK.contiguous()
    fp8 = scale_inv_IJ is not None
    weight = weight_NK.view(torch.uint8 if fp8 else torch.int16)
    scale_inv = weight if scale_inv_IJ is None else scale_inv_IJ.contiguous()  # BF16: a pointer never read
    grid = (triton.cdiv(N, TILE["BN"]), triton.cdiv(K // GROUP, TILE["BG"]))
    return (weight, scale_inv, N, K, -(-K // block[1]), *block, fp8), grid
