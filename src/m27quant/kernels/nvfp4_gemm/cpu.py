"""NVFP4 products by the compiled core, `_native/nvfp4_gemm.c`: weights are read as they are packed.

Batch-invariant always: a token's sums have one order, whatever else is computed and on however many threads.

Shapes: T tokens, N out features, K in features, B = ceil(N/16) blocks of rows, G = K/16 groups.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from m27quant.kernels import cpu_level, native
from m27quant.kernels.nvfp4_pack import GROUP, PackedNVFP4

ROWS = 16
"""Rows of a block in `_native/nvfp4.h`."""


def prepare(packed: PackedNVFP4, activations: str) -> tuple[Tensor, ...]:
    """Codes U8 [B, G, 128], block scales U8 [B, G, 16], global scale F32 []; both kinds of products read them."""
    N, K2 = packed.weight.shape
    codes, scales = empty(N, K2 * 2)
    repack(packed, codes, scales)
    return codes, scales, packed.weight_scale_2.reshape(()).clone()


def empty(N: int, K: int, *batch: int) -> tuple[Tensor, Tensor]:
    """Room for prepared codes and block scales, after the dimensions `batch`."""
    shape = (*batch, -(-N // ROWS), K // GROUP)
    codes = torch.empty(*shape, ROWS * GROUP // 2, dtype=torch.uint8)
    native.function("m27_advise_large_pages")(codes.data_ptr(), codes.nbytes)
    return codes, torch.empty(*shape, ROWS, dtype=torch.uint8)


def repack(packed: PackedNVFP4, codes: Tensor, scales: Tensor) -> None:
    """Write a matrix to contiguous buffers of `empty`."""
    N, K2 = packed.weight.shape
    source = (packed.weight.contiguous(), packed.weight_scale.contiguous())
    arguments = (*(t.data_ptr() for t in source), N, K2 * 2, codes.data_ptr(), scales.data_ptr())
    core = functools.partial(native.function("m27_nvfp4_prepare"), *arguments)
    native.over_rows(core, codes.shape[0], 1, ROWS * K2)


def unpack(tensors: tuple[Tensor, ...], shape: tuple[int, int]) -> Tensor:
    """F32 [N, K], bit for bit what `nvfp4_pack.unpack` gives."""
    out_NK = torch.empty(shape)
    codes, scales, scale_2 = (tensor.data_ptr() for tensor in tensors)
    arguments = (codes, scales, shape[1], scale_2, out_NK.data_ptr())
    core = functools.partial(native.function("m27_nvfp4_unpack"), *arguments)
    native.over_rows(core, shape[0], 1, shape[1] * 4)
    return out_NK


def gemm(
    x_TK: Tensor,
    tensors: tuple[Tensor, ...],
    shape: tuple[int, int],
    activations: str,
    input_scale: Tensor | None,
    invariant: bool,
) -> Tensor:
    """See `reference.gemm`."""
    (T, K), N = x_TK.shape, shape[0]
    quantized, is_bf16, level = activations == "nvfp4", x_TK.dtype == torch.bfloat16, cpu_level.level()
    y_TN = torch.empty(T, N, dtype=x_TK.dtype)
    panel = torch.empty(T * panel_bytes(level, quantized, is_bf16, K), dtype=torch.uint8)
    factor_T, phases = torch.empty(T, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    scale = input_scale.data_ptr() if input_scale is not None and quantized else None
    weight = [tensor.data_ptr() for tensor in tensors]
    buffers = [tensor.data_ptr() for tensor in (panel, factor_T, y_TN, phases)]
    arguments = (level, x_TK.data_ptr(), is_bf16, T, N, K, *weight, scale, *buffers)
    native.together(
        functools.partial(native.function("m27_nvfp4_gemm"), *arguments), min(T, 1) * tensors[0].nbytes
    )
    return y_TN


def panel_bytes(level: int, quantized: bool, is_bf16: bool, K: int) -> int:
    """What one token takes, arranged for products."""
    count: int = native.function("m27_nvfp4_panel_bytes")(level, quantized, is_bf16, K)
    return count
