"""Root-mean-square norm in Triton: the bits of `reference`.

One program a row, so that a row's result depends on that row alone.  The squares are summed in F64, whose rounding
the mean in F32 does not show; BF16 is rounded by integers, everything else is one correctly rounded operation.

In the kernel: b_ a tile, o_ offsets, m_ a mask; BD the row's length, rounded up to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m27quant.kernels.bits import as_bits, bf16_bits, rounded, to_f32

OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def scale_of_mean(square_sum, D, eps):
    """1 / sqrt(sum / D + eps), F32, from an F64 sum of squares."""
    mean = (square_sum / D.to(tl.float64)).to(tl.float32)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def rms_norm_kernel(x, weight, y, D, stride, eps, BF16: tl.constexpr, BD: tl.constexpr):
    """`y` [rows, D] of `x` [rows, D] with rows `stride` apart; BF16 as int16."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_x = to_f32(tl.load(x + row * stride + o_d, mask=m_d, other=0))
    b_wide = b_x.to(tl.float64)
    scale = scale_of_mean(tl.sum(b_wide * b_wide, axis=0), D, eps)
    b_y = to_f32(tl.load(weight + o_d, mask=m_d, other=0)) * rounded(b_x * scale, BF16)
    tl.store(y + row * D + o_d, bf16_bits(b_y) if BF16 else b_y, mask=m_d)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    D = x.shape[-1]
    rows = x.reshape(-1, D)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if len(rows):
        BD = triton.next_power_of_2(D)
        rms_norm_kernel[(len(rows),)](
            as_bits(rows), as_bits(weight_D.contiguous()), as_bits(y), D, rows.stride(0), eps,
            BF16=x.dtype == torch.bfloat16, BD=BD, num_warps=min(max(BD // 512, 1), 16), **OPTIONS,
        )  # fmt: skip
    return y
