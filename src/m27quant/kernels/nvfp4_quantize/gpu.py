"""NVFP4 activations in Triton: the bytes of `reference`.

Equal by construction: every float step is one correctly rounded operation (`tl.div_rn`, no fusion to FMA, as
`OPTIONS` says), maxima are taken of the bits, so that a NaN lies above Inf, and E4M3 and E2M1 are rounded by integers.
Blackwell rounds to E2M1 in hardware (`cvt.rn.satfinite.e2m1x2`): the same ties and the same signs of zero, but a NaN
would become +6, so it is replaced first.

In the kernels: b_ a tile, o_ offsets, m_ a mask; BT rows, BG groups of 16 columns in a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m27quant.kernels import chip
from m27quant.kernels.bits import as_bits, e4m3_bits, e4m3_value, to_f32
from m27quant.kernels.nvfp4_pack.reference import GROUP

TILE = {"BT": 8, "BG": 16}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def block_scales(b_amax, input_scale):
    """E4M3 codes of block scales, int32, for the maxima of groups, and what the elements are multiplied with."""
    S = tl.div_rn(1.0, input_scale)
    b_code = e4m3_bits(b_amax * (S * 0.16666667163372040))  # F32(1/6)
    b_product = e4m3_value(b_code) * tl.div_rn(1.0, S)
    b_factor = tl.div_rn(tl.zeros_like(b_product) + 1.0, b_product)
    return b_code, tl.where(b_factor > 3.4028234663852886e38, 3.4028234663852886e38, b_factor)


@triton.jit
def e2m1_magnitudes(b_y):
    """E2M1 codes of |y| without sign, int32: to the nearest, ties to even, saturating; not of NaN."""
    b_a = tl.abs(b_y)
    b_u = b_a.to(tl.int32, bitcast=True)
    b_large = ((b_u + 0x1FFFFF + ((b_u >> 22) & 1)) >> 22) - 252
    b_small = (b_a + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000  # below 1: the ulp of 2**22 is 1/2
    return tl.minimum(tl.where(b_a < 1.0, b_small, b_large), 7)


@triton.jit
def e2m1_pairs(b_y, b_sign, HARDWARE: tl.constexpr):
    """E2M1 codes of [..., 2] values, two to an int32 byte, the first in the low half.

    `b_sign` is 0 or 8 for each, the sign of y also where it is 0 or NaN.
    """
    b_y = tl.where(b_y == b_y, b_y, 0.0)
    if HARDWARE:
        b_signed = (b_y.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (b_sign << 28)
        b_low, b_high = tl.split(b_signed)
        return tl.inline_asm_elementwise(
            "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, $2, $1; cvt.u32.u8 $0, t; }",
            "=r,r,r",
            args=[b_low, b_high],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    b_low, b_high = tl.split(e2m1_magnitudes(b_y) | b_sign)
    return b_low | (b_high << 4)


@triton.jit
def nvfp4_quantize_kernel(
    x, input_scale, codes, scales, T, G, stride_t,
    SWIZZLED: tl.constexpr, HARDWARE: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """`codes` U8 [T, G * 8], `scales` U8 (E4M3 bits) [T, G], or swizzled with zeros where it is padded."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_g = tl.program_id(1) * BG + tl.arange(0, BG)
    o_16 = tl.arange(0, 16)[None, None, :]
    m_tg = (o_t < T)[:, None] & (o_g < G)[None, :]
    o_x = o_t[:, None, None] * stride_t + (o_g * 16)[None, :, None] + o_16
    b_x = to_f32(tl.load(x + o_x, mask=m_tg[:, :, None], other=0))
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_amax = tl.max(b_bits & 0x7FFFFFFF, axis=2).to(tl.float32, bitcast=True)

    b_code, b_factor = block_scales(b_amax, tl.load(input_scale))
    b_y = tl.reshape(b_x * b_factor[:, :, None], (BT, BG, 8, 2))
    b_sign = tl.reshape((b_bits >> 28) & 8, (BT, BG, 8, 2))
    b_bytes = e2m1_pairs(b_y, b_sign, HARDWARE)

    o_tg = o_t[:, None] * G + o_g[None, :]
    tl.store(
        codes + o_tg[:, :, None] * 8 + tl.arange(0, 8)[None, None, :],
        b_bytes.to(tl.uint8),
        mask=m_tg[:, :, None],
    )
    if SWIZZLED:
        columns = tl.cdiv(G, 4)
        o_tile = (o_t // 128)[:, None] * columns + (o_g // 4)[None, :]
        o_row = (o_t % 32) * 16 + (o_t // 32 % 4) * 4
        o_tg = o_tile * 512 + o_row[:, None] + (o_g % 4)[None, :]
        m_tg = (o_t < tl.cdiv(T, 128) * 128)[:, None] & (o_g < columns * 4)[None, :]
    tl.store(scales + o_tg, b_code.to(tl.uint8), mask=m_tg)


def quantize(x_TK: Tensor, input_scale: Tensor, *, swizzled: bool = False) -> tuple[Tensor, Tensor]:
    """See `reference.quantize`; with `swizzled` the scales are those of `reference.swizzle`."""
    T, K = x_TK.shape
    G = K // GROUP
    if x_TK.dtype == torch.float64:
        x_TK = x_TK.float()
    if K and x_TK.stride(1) != 1:
        x_TK = x_TK.contiguous()
    rows, groups = (-(-T // 128) * 128, -(-G // 4) * 4) if swizzled else (T, G)
    shape = (rows // 128, groups // 4, 32, 4, 4) if swizzled else (T, G)
    codes = torch.empty((T, K // 2), dtype=torch.uint8, device=x_TK.device)
    scales = torch.empty(shape, dtype=torch.uint8, device=x_TK.device)
    grid = (triton.cdiv(rows, TILE["BT"]), triton.cdiv(groups, TILE["BG"]))
    if scales.numel():
        nvfp4_quantize_kernel[grid](
            as_bits(x_TK), input_scale, codes, scales, T, G, x_TK.stride(0),
            SWIZZLED=swizzled, HARDWARE=_rounds_in_hardware(x_TK.device), **TILE, **OPTIONS,
        )  # fmt: skip
    return codes, scales.view(torch.float8_e4m3fn)


def _rounds_in_hardware(device: torch.device) -> bool:
    return device.type != "cpu" and chip.of(device).fp4
