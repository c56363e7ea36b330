"""Block dequantization of FP8 weights in plain torch: the specification.

Shapes: N out features, K in features, I = ceil(N/block[0]), J = ceil(K/block[1]).
"""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(
    weight_NK: Tensor, scale_inv_IJ: Tensor, dtype: torch.dtype, block: tuple[int, int], out_NK: Tensor
) -> Tensor:
    """`(weight.float() * scale).to(dtype)`, one F32 product and one rounding; NaN and Inf pass through.

    Works in strips of `block[0]` rows, so that the F32 intermediate stays small.
    """
    rows, columns = block
    for i, scale_J in enumerate(scale_inv_IJ):
        strip = slice(i * rows, (i + 1) * rows)
        scale_K = scale_J.repeat_interleave(columns)[: weight_NK.shape[1]]
        out_NK[strip] = (weight_NK[strip].float() * scale_K).to(dtype)
    return out_NK
