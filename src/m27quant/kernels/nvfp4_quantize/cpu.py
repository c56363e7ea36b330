"""Quantizing activations by the compiled core, `_native/nvfp4_rows.c`: the bytes of `reference`, far faster."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from m27quant.kernels import native
from m27quant.kernels.nvfp4_pack.reference import GROUP


def quantize(x_TK: Tensor, input_scale: Tensor, *, swizzled: bool) -> tuple[Tensor, Tensor]:
    """See `reference.quantize` and `reference.swizzle`."""
    if x_TK.dtype not in (torch.bfloat16, torch.float32):
        x_TK = x_TK.float()
    x_TK = x_TK.contiguous()
    T, K = x_TK.shape
    codes = torch.empty(T, K // 2, dtype=torch.uint8)
    if swizzled:
        scale = torch.zeros(-(-T // 128), -(-K // 64), 32, 4, 4, dtype=torch.uint8)
    else:
        scale = torch.empty(T, K // GROUP, dtype=torch.uint8)
    is_bf16 = x_TK.dtype == torch.bfloat16
    arguments = (
        x_TK.data_ptr(),
        is_bf16,
        K,
        float(input_scale),
        swizzled,
        codes.data_ptr(),
        scale.data_ptr(),
    )
    core = functools.partial(native.function("m27_nvfp4_quantize"), *arguments)
    native.over_rows(core, T, 1, x_TK.element_size() * K)
    return codes, scale.view(torch.float8_e4m3fn)
