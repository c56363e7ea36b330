"""Rows of activations quantized for a W4A4 product, each under the scale of its expert.

The bytes are those of `nvfp4_quantize`.  For FP4 tensor cores they stay codes and plain E4M3 scales; for all others
they become E2M1 * E4M3 at once, which BF16 holds exactly (6 significant bits), without the static scale.

In the kernel: b_ a tile, o_ offsets, m_ a mask; BR rows, BG groups of 16 columns in a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m27quant.kernels import chip
from m27quant.kernels.bits import as_bits, bf16_bits, e4m3_value, to_f32
from m27quant.kernels.nvfp4_quantize.gpu import block_scales, e2m1_magnitudes, e2m1_pairs

TILE = {"BR": 8, "BG": 16}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def exact_value(b_y, b_sign, b_scale):
    """E2M1(y) * scale as F32, without rounding; a NaN scale makes it NaN.  `b_sign` int32, 0 or 8."""
    b_y = tl.where(b_y == b_y, b_y, 0.0)
    b_bits = (e2m1_magnitudes(b_y) << 22) | (b_sign << 28)
    return (
        b_bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * b_scale  # 2**126
    )


@triton.jit(do_not_specialize=["R", "first", "count"])
def nvfp4_rows_kernel(
    x, input_scale, experts, codes, scales, R, G, first, count,
    TOPK: tl.constexpr, BY_EXPERT: tl.constexpr, FP4: tl.constexpr, HARDWARE: tl.constexpr,
    BR: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Row r of R from row r // TOPK of `x` [.., G * 16].

    FP4: `codes` U8 [R, G * 8], `scales` E4M3 bits [R, G]; else `codes` BF16 as int16 [R, G * 16].
    BY_EXPERT: under input_scale[experts[r] - first]; rows of other experts stay as they are.  Else input_scale[0].
    """
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_g = tl.program_id(1) * BG + tl.arange(0, BG)
    m_r = o_r < R
    if BY_EXPERT:
        b_e = tl.load(experts + o_r, mask=m_r, other=-1) - first
        m_r = m_r & (b_e >= 0) & (b_e < count)
        b_is = tl.load(input_scale + b_e, mask=m_r, other=1.0)
    else:
        b_is = tl.zeros((BR,), tl.float32) + tl.load(input_scale)
    m_rg = m_r[:, None] & (o_g < G)[None, :]
    o_16 = tl.arange(0, 16)[None, None, :]
    o_x = ((o_r // TOPK)[:, None] * G + o_g[None, :])[:, :, None] * 16 + o_16
    b_x = to_f32(tl.load(x + o_x, mask=m_rg[:, :, None], other=0))
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_amax = tl.max(b_bits & 0x7FFFFFFF, axis=2).to(tl.float32, bitcast=True)
    b_code, b_factor = block_scales(b_amax, tl.broadcast_to(b_is[:, None], (BR, BG)))
    b_y = b_x * b_factor[:, :, None]
    b_sign = (b_bits >> 28) & 8
    o_rg = o_r[:, None] * G + o_g[None, :]
    if FP4:
        b_bytes = e2m1_pairs(b_y.reshape(BR, BG, 8, 2), b_sign.reshape(BR, BG, 8, 2), HARDWARE)
        o_byte = o_rg[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        tl.store(codes + o_byte, b_bytes.to(tl.uint8), mask=m_rg[:, :, None])
        tl.store(scales + o_rg, b_code.to(tl.uint8), mask=m_rg)
    else:
        b_value = exact_value(b_y, b_sign, e4m3_value(b_code)[:, :, None])
        tl.store(codes + o_rg[:, :, None] * 16 + o_16, bf16_bits(b_value), mask=m_rg[:, :, None])


def quantize_rows(
    x_TK: Tensor,
    input_scale: Tensor,
    *,
    fp4: bool,
    experts: Tensor | None = None,
    first: int = 0,
    topk: int = 1,
) -> tuple[Tensor, Tensor]:
    """Activations [T, K] (BF16 or F32) for a product, as [R, ..] rows: R = T, or one for each of `experts` [T, topk].

    Args:
        x_TK: contiguous, K a multiple of 16.
        input_scale: F32 [1] or [], or with `experts` the scale of each expert from `first` on, F32 [C].
        fp4: codes U8 [R, K/2] and E4M3 [R, K/16]; otherwise BF16 [R, K], twice.
        experts: rows of experts that `input_scale` does not have are not written.
        first: the first expert's number.
        topk: slots of a token.
    """
    (T, K), G = x_TK.shape, x_TK.shape[1] // 16
    R = T if experts is None else T * topk
    hardware = fp4 and x_TK.device.type != "cpu" and chip.of(x_TK.device).fp4
    if fp4:
        codes = torch.empty((R, K // 2), dtype=torch.uint8, device=x_TK.device)
        scales = torch.empty((R, G), dtype=torch.float8_e4m3fn, device=x_TK.device)
    else:
        codes = scales = torch.empty((R, K), dtype=torch.bfloat16, device=x_TK.device)
    grid = (triton.cdiv(R, TILE["BR"]), triton.cdiv(G, TILE["BG"]))
    if R:
        nvfp4_rows_kernel[grid](
            as_bits(x_TK), input_scale, x_TK if experts is None else experts, as_bits(codes), as_bits(scales),
            R, G, first, input_scale.numel(),
            TOPK=1 if experts is None else topk, BY_EXPERT=experts is not None, FP4=fp4, HARDWARE=hardware,
            **TILE, **OPTIONS,
        )  # fmt: skip
    return codes, scales
