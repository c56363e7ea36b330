"""BF16 and FP8 by integers, inside Triton kernels: the same bits on every chip and in Triton's interpreter.

The interpreter computes BF16 on raw bits and truncates where it should round, and chips before sm_89 have no FP8.
So kernels that have to be exact get such tensors as integers of the same width, and convert them here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTEGERS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}


def as_bits(x: Tensor) -> Tensor:
    """BF16 seen as int16 and E4M3 as uint8, which the functions below take; anything else as it is."""
    return x.view(_INTEGERS.get(x.dtype, x.dtype))


@triton.jit
def to_f32(b):
    """F32 values of what was loaded: F32, F16, or the bits of BF16 (int16) or of E4M3 (uint8)."""
    if b.dtype == tl.int16:
        return (b.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if b.dtype == tl.uint8:
        return e4m3_value(b.to(tl.int32))
    return b.to(tl.float32)


@triton.jit
def bf16_bits(b):
    """F32 to BF16, to the nearest, ties to even, as int16; a NaN stays one."""
    b_u = b.to(tl.int32, bitcast=True)
    b_r = (b_u + 0x7FFF + ((b_u >> 16) & 1)) >> 16
    return tl.where(b == b, b_r, (b_u >> 16) | 0x40).to(tl.int16)


@triton.jit
def rounded(b, BF16: tl.constexpr):
    """F32 values, rounded to BF16 if asked for."""
    if BF16:
        return to_f32(bf16_bits(b))
    return b


@triton.jit
def e4m3_bits(b):
    """F32 to E4M3, to the nearest, ties to even, saturating at 448, as int32 of 8 bits; a NaN becomes 0x7F or 0xFF."""
    b_u = b.to(tl.int32, bitcast=True)
    b_a = tl.abs(b)
    b_a = tl.where(b_a > 448.0, 448.0, b_a)
    b_m = b_a.to(tl.int32, bitcast=True)
    # below 2**-6: the ulp of 2**14 is 2**-9
    b_small = (b_a + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    b_large = (b_m + 0x7FFFF + ((b_m >> 20) & 1) - 0x3C000000) >> 20
    b_code = tl.where(b_a < 0.015625, b_small, b_large)
    return tl.where(b == b, b_code, 0x7F) | ((b_u >> 24) & 0x80)


@triton.jit
def e4m3_value(b):
    """F32 values of E4M3 codes, int32 of 8 bits; exact."""
    b_c = b & 0x7F
    b_normal = ((b_c << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    b_v = tl.where(b_c < 8, b_c.to(tl.float32) * 0.001953125, b_normal)  # 2**-9
    b_s = tl.where(b_c == 0x7F, 0x7FC00000, b_v.to(tl.int32, bitcast=True)) | ((b & 0x80) << 24)
    return b_s.to(tl.float32, bitcast=True)
