"""NVFP4 packing in plain torch: the specification, modelopt 0.47's formula bit for bit.

Shapes: N out features, K in features, G = K/16 groups, R rows of one strip.
Every step below is one correctly rounded operation, so any backend can repeat it exactly:

    weight_scale_2 = amax / 2688                       2688 = 6 * 448, largest E2M1 times largest E4M3
    s              = max|x| of the group / (6 * weight_scale_2), 1 where that is 0
    weight_scale   = E4M3(clamp(s, 2**-9, 448))        never 0, never NaN
    y              = x / (weight_scale * weight_scale_2)
    code           = E2M1(y), ties to even, saturating at 6; the sign bit is `y < 0`, so -0.0 has code 0
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m27quant.kernels.fp8_dequant.reference import dequantize

GROUP = 16
"""Elements under one block scale."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
"""The smallest positive E4M3 value: the floor of a block scale."""

DEAD_AMAX = E2M1_MAX
"""Stands in for an amax of 0, where modelopt's weight path exports scale 0 and NaN block scales: what its own
`TensorQuantizer.export_amax` puts in place of a zero amax, the largest value of the quantizer."""

_STRIP_ELEMENTS = 1 << 22  # bounds the F32 intermediates of one strip to a few times 16 MiB


def bf16_rows(weight_NK: Tensor, scale_inv_IJ: Tensor | None, rows: slice, block: tuple[int, int]) -> Tensor:
    """The BF16 values of some rows; `rows.start` lies on a block boundary of an FP8 weight."""
    if scale_inv_IJ is None:
        return weight_NK[rows]
    codes_RK = weight_NK[rows]
    scale_IJ = scale_inv_IJ[rows.start // block[0] : -(-rows.stop // block[0])]
    return dequantize(
        codes_RK, scale_IJ, torch.bfloat16, block, torch.empty_like(codes_RK, dtype=torch.bfloat16)
    )


def strips(weight_NK: Tensor, block: tuple[int, int]) -> list[slice]:
    """Row ranges that cover the weight, cut at block boundaries, each small enough to hold in F32."""
    N, K = weight_NK.shape
    step = max(_STRIP_ELEMENTS // K // block[0], 1) * block[0]
    return [slice(start, min(start + step, N)) for start in range(0, N, step)]


def groups(x_RK: Tensor) -> Tensor:
    """The same elements as [R, G, 16]."""
    return x_RK.reshape(x_RK.shape[0], x_RK.shape[1] // GROUP, GROUP)


def amax(weight_NK: Tensor, scale_inv_IJ: Tensor | None, block: tuple[int, int]) -> Tensor:
    """Exact max |x| as F32 []; NaN or Inf where the weight has one."""
    maxima = [
        bf16_rows(weight_NK, scale_inv_IJ, rows, block).abs().amax().float()
        for rows in strips(weight_NK, block)
    ]
    return torch.stack(maxima).amax()


def global_scale(amax: Tensor) -> Tensor:
    """`weight_scale_2` F32 [] from the weight's amax F32 []."""
    # A tensor, not a Python number: torch multiplies by the reciprocal of a number on CUDA.
    largest = torch.tensor(E2M1_MAX * E4M3_MAX, device=amax.device)
    return torch.where(amax == 0, torch.full_like(amax, DEAD_AMAX), amax) / largest


def pack(
    weight_NK: Tensor,
    scale_inv_IJ: Tensor | None,
    weight_scale_2: Tensor,
    block: tuple[int, int],
    out_codes_NK2: Tensor,
    out_scale_NG: Tensor,
) -> bool:
    """Encode into the two buffers; False, with undefined buffers, where a weight is NaN or Inf."""
    for rows in strips(weight_NK, block):
        x_RK = bf16_rows(weight_NK, scale_inv_IJ, rows, block).float()
        x_RG16 = groups(x_RK)
        if not x_RK.isfinite().all():
            return False
        scale_RG = unclamped_scale(x_RG16, weight_scale_2)
        scale8_RG = scale_RG.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
        out_codes_NK2[rows] = encode(x_RG16, scale8_RG, weight_scale_2)
        out_scale_NG[rows] = scale8_RG
    return True


def encode(x_RG16: Tensor, scale8_RG: Tensor, weight_scale_2: Tensor) -> Tensor:
    """Codes U8 [R, K/2] of F32 values under given block scales."""
    y_RG16 = x_RG16 / (scale8_RG.float() * weight_scale_2)[..., None]
    codes_RK = e2m1_codes(y_RG16).flatten(1)
    return codes_RK[:, 0::2] | (codes_RK[:, 1::2] << 4)


def unclamped_scale(x_RG16: Tensor, weight_scale_2: Tensor) -> Tensor:
    """The block scales F32 [R, G] before they are brought into E4M3's range."""
    scale_RG = x_RG16.abs().amax(-1) / (E2M1_MAX * weight_scale_2)
    return scale_RG.masked_fill_(scale_RG == 0, 1.0)


def e2m1_codes(y: Tensor) -> Tensor:
    """E2M1 codes U8 of F32 values: sign bit 3, magnitude 0-7; nearest, ties to the even code."""
    a = y.abs()
    code = (a > 0.25).to(torch.uint8)
    for reached in (a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5):
        code += reached
    return code | ((y < 0).to(torch.uint8) << 3)


def unpack(codes_NK2: Tensor, scale_NG: Tensor, weight_scale_2: Tensor) -> Tensor:
    """The F32 [N, K] values that the codes stand for: E2M1 times the F32 product of both scales."""
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], device=codes_NK2.device)
    codes_NK = torch.stack((codes_NK2 & 15, codes_NK2 >> 4), dim=-1).flatten(1)
    scale_NG1 = (scale_NG.float() * weight_scale_2)[..., None]
    return (groups(values[codes_NK.int()]) * scale_NG1).flatten(1)


def row_errors(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, packed: Sequence[Tensor], block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Sums of x*x and (x-y)*(x-y) for each row, F64 [N], x the BF16 value and y the unpacked F32 one.

    The order of additions is part of the specification, so that every CPU backend gives the same sum:
    lane j adds the j-th elements of the row's groups from left to right; then the 16 lanes are halved
    four times, lane j adding lane j+8, j+4, j+2, j+1.
    """
    codes_NK2, scale_NG, weight_scale_2 = packed
    signal_N, noise_N = torch.empty(2, weight_NK.shape[0], dtype=torch.float64, device=weight_NK.device)
    for rows in strips(weight_NK, block):
        x_RK = bf16_rows(weight_NK, scale_inv_IJ, rows, block).double()
        d_RK = x_RK - unpack(codes_NK2[rows], scale_NG[rows], weight_scale_2).double()
        signal_N[rows] = _lane_sum(groups(x_RK.square()))
        noise_N[rows] = _lane_sum(groups(d_RK.square()))
    return signal_N, noise_N


def exact_row_errors(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, packed: Sequence[Tensor], block: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`row_errors`, and `amax`, where `pack` gives these codes and scales; else None, as for NaN or Inf."""
    codes_NK2, scale_NG, weight_scale_2 = packed
    again = torch.empty_like(codes_NK2), torch.empty_like(scale_NG)
    if not pack(weight_NK, scale_inv_IJ, weight_scale_2, block, *again):
        return None
    if not all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(packed, again, strict=False)
    ):
        return None
    return *row_errors(weight_NK, scale_inv_IJ, packed, block), amax(weight_NK, scale_inv_IJ, block)


def _lane_sum(v_RG16: Tensor) -> Tensor:
    lanes = v_RG16.cumsum(1)[:, -1]  # cumsum, unlike sum, adds from left to right
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def count_groups(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, weight_scale_2: Tensor, block: tuple[int, int]
) -> tuple[int, int, int]:
    """How many groups are all zero, how many have a scale above 448, how many one below 2**-9."""
    zero = saturated = tiny = 0
    for rows in strips(weight_NK, block):
        x_RG16 = groups(bf16_rows(weight_NK, scale_inv_IJ, rows, block).float())
        scale_RG = unclamped_scale(x_RG16, weight_scale_2)
        zero += int((x_RG16 == 0).all(-1).sum())
        saturated += int((scale_RG > E4M3_MAX).sum())
        tiny += int((scale_RG < E4M3_TINY).sum())
    return zero, saturated, tiny
