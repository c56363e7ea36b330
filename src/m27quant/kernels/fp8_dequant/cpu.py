"""Block dequantization by the compiled core; F16 output is left to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from m27quant.kernels import native
from m27quant.kernels.fp8_dequant import reference


def dequantize(
    weight_NK: Tensor, scale_inv_IJ: Tensor, dtype: torch.dtype, block: tuple[int, int], out_NK: Tensor
) -> Tensor:
    """The bytes of `reference.dequantize`, about twenty times as fast."""
    if dtype == torch.float16:
        return reference.dequantize(weight_NK, scale_inv_IJ, dtype, block, out_NK)
    weight_NK, scale_inv_IJ = weight_NK.contiguous(), scale_inv_IJ.contiguous()
    N, K = weight_NK.shape
    core = native.function("m27_dequantize")
    out16, out32 = (out_NK.data_ptr(), None) if dtype == torch.bfloat16 else (None, out_NK.data_ptr())

    def rows(first: int, end: int) -> None:
        core(weight_NK.data_ptr(), scale_inv_IJ.data_ptr(), K, *block, out16, out32, first, end)

    native.over_rows(rows, N, step=1, row_bytes=K)
    return out_NK
