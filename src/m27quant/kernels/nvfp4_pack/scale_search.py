"""The block scale with the least squared error, in plain torch: the specification of `scales="mse"`.

All 126 positive E4M3 scales are tried.  Of a scale s, with d = F32(s * weight_scale_2) and F32 values y = E2M1(x/d) * d
as `pack` and `unpack` have them, the error of a group of 16 is

    e(s) = sum of (x_j - y_j) * (x_j - y_j)  [* w_j]

in F64: each difference, square and product is rounded once; the 16 terms are halved four times, lane j adding lane
j+8, j+4, j+2, j+1.  That is a group's part of `squared_error`.  The least e(s) wins, among equals the smallest s, as in
modelopt 0.47's sweep, which takes the first best in ascending order.  docs/quality.md says how other backends
find the same scale without trying all.

Shapes: R rows, G groups of 16 in a row, K = 16 G.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m27quant.kernels.nvfp4_pack.reference import (
    E2M1_VALUES,
    GROUP,
    bf16_rows,
    encode,
    groups,
    strips,
    unpack,
)

NUM_SCALES = 126
"""Positive finite E4M3 numbers: the codes 1 to 126."""


def pack(
    weight_NK: Tensor,
    scale_inv_IJ: Tensor | None,
    weight_scale_2: Tensor,
    block: tuple[int, int],
    channel_weight_K: Tensor | None,
    out_codes_NK2: Tensor,
    out_scale_NG: Tensor,
) -> bool:
    """Encode into the two buffers; False, with undefined buffers, where a weight is NaN or Inf."""
    weight_G16 = None if channel_weight_K is None else channel_weight_K.view(-1, GROUP)
    for rows in strips(weight_NK, block):
        x_RG16 = groups(bf16_rows(weight_NK, scale_inv_IJ, rows, block).float())
        if not x_RG16.isfinite().all():
            return False
        scale8_RG = least_error_scales(x_RG16, weight_scale_2, weight_G16)
        out_codes_NK2[rows] = encode(x_RG16, scale8_RG, weight_scale_2)
        out_scale_NG[rows] = scale8_RG
    return True


def candidates(device: torch.device) -> Tensor:
    """The positive finite E4M3 numbers in ascending order, F32 [126]."""
    return torch.arange(1, NUM_SCALES + 1, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def least_error_scales(x_RG16: Tensor, weight_scale_2: Tensor, weight_G16: Tensor | None) -> Tensor:
    """The best block scales, float8_e4m3fn [R, G].

    Args:
        x_RG16: F32 [R, G, 16], finite BF16 values.
        weight_scale_2: F32 [].
        weight_G16: F32 [G, 16] weights of the squares, finite, not negative, or None.
    """
    best_RG = torch.full(x_RG16.shape[:2], torch.inf, dtype=torch.float64, device=x_RG16.device)
    code_RG = torch.zeros(x_RG16.shape[:2], dtype=torch.uint8, device=x_RG16.device)
    for index, scale in enumerate(candidates(x_RG16.device)):
        error_RG = group_errors(x_RG16, scale * weight_scale_2, weight_G16)
        better_RG = error_RG < best_RG
        best_RG = torch.where(better_RG, error_RG, best_RG)
        code_RG = torch.where(better_RG, index + 1, code_RG)
    return code_RG.to(torch.uint8).view(torch.float8_e4m3fn)


def group_errors(x_RG16: Tensor, step: Tensor, weight_G16: Tensor | None) -> Tensor:
    """e(s) of every group, F64 [R, G], for `step` d = F32(s * weight_scale_2), one or one a group ([R, G])."""
    magnitude = x_RG16.abs()
    d = step[..., None] if step.dim() else step
    y = rounded(magnitude / d) * d
    terms = (magnitude.double() - y.double()).square()
    if weight_G16 is not None:
        terms = terms * weight_G16.double()
    return _halved(terms)


def packed_errors(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, packed: Sequence[Tensor], block: tuple[int, int]
) -> Tensor:
    """The error of every group of a packed weight, F64 [N, G], whatever its codes and scales are."""
    codes_NK2, scale_NG, weight_scale_2 = packed
    error_NG = torch.empty(scale_NG.shape, dtype=torch.float64, device=scale_NG.device)
    for rows in strips(weight_NK, block):
        x_RK = bf16_rows(weight_NK, scale_inv_IJ, rows, block).double()
        y_RK = unpack(codes_NK2[rows], scale_NG[rows], weight_scale_2).double()
        error_NG[rows] = _halved(groups((x_RK - y_RK).square()))
    return error_NG


def _halved(terms: Tensor) -> Tensor:
    for half in (8, 4, 2, 1):
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def rounded(a: Tensor) -> Tensor:
    """The E2M1 values of non-negative F32 numbers: nearest, ties to the even code; 0 for NaN (0 / 0)."""
    value = torch.zeros_like(a)
    reached = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5)
    for low, high, at in zip(E2M1_VALUES, E2M1_VALUES[1:], reached, strict=False):
        value += at * (high - low)
    return value
