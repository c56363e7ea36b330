"""FP8 block dequantization: `weight` E4M3 [N, K] times `weight_scale_inv` F32 per 128x128 block."""

from __future__ import annotations

import torch
from torch import Tensor

from m27quant.errors import CheckpointError
from m27quant.kernels.dispatch import choose
from m27quant.kernels.fp8_dequant import reference

BLOCK = (128, 128)
"""Rows and columns under one scale in the official FP8 checkpoints."""


def dequantize(
    weight_NK: Tensor,
    scale_inv_IJ: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    block: tuple[int, int] = BLOCK,
    out: Tensor | None = None,
) -> Tensor:
    """The values that an FP8 block-quantized weight stands for.

    Args:
        weight_NK: float8_e4m3fn [N, K].
        scale_inv_IJ: F32 [ceil(N/block[0]), ceil(K/block[1])]; it multiplies, whatever its name says.
        dtype: of the result: bfloat16, float16 or float32.
        block: rows and columns that share a scale; blocks at the lower and right edge may be smaller.
        out: a contiguous [N, K] tensor of `dtype` to write to, on the weight's device.

    Returns:
        [N, K] in `dtype`, bit for bit `(weight.float() * scale).to(dtype)`.  NaN and Inf pass through:
        whoever encodes the values refuses them.

    Raises:
        CheckpointError: a dtype or shape that does not make a block-quantized weight.
        ValueError: an `out` that does not fit.
    """
    check_blocks(weight_NK, scale_inv_IJ, block)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"cannot dequantize to {dtype}: bfloat16, float16 or float32")
    out = _buffer(out, weight_NK.shape, dtype, weight_NK.device)
    if choose("fp8_dequant", weight_NK.device).backend == "cpu-native":
        from m27quant.kernels.fp8_dequant import cpu

        return cpu.dequantize(weight_NK, scale_inv_IJ, dtype, block, out)
    return reference.dequantize(weight_NK, scale_inv_IJ, dtype, block, out)


def check_blocks(weight_NK: Tensor, scale_inv_IJ: Tensor, block: tuple[int, int] = BLOCK) -> None:
    """Refuse a weight and a scale tensor that do not belong together.

    Raises:
        CheckpointError: wrong dtype, not a matrix, no elements, or scales of another grid of blocks.
    """
    if block[0] < 1 or block[1] < 1:
        raise CheckpointError(f"FP8 blocks of {block[0]}x{block[1]}: both sides must be at least 1")
    if weight_NK.dtype != torch.float8_e4m3fn:
        raise CheckpointError(f"weight is {weight_NK.dtype}, block dequantization needs torch.float8_e4m3fn")
    if scale_inv_IJ.dtype != torch.float32:
        raise CheckpointError(f"weight_scale_inv is {scale_inv_IJ.dtype}, must be torch.float32")
    if weight_NK.dim() != 2 or weight_NK.numel() == 0:
        raise CheckpointError(f"weight has shape {list(weight_NK.shape)}, must be a matrix with elements")
    expected = [-(-side // step) for side, step in zip(weight_NK.shape, block, strict=True)]
    if list(scale_inv_IJ.shape) != expected:
        raise CheckpointError(
            f"weight_scale_inv has shape {list(scale_inv_IJ.shape)}, a weight of shape "
            f"{list(weight_NK.shape)} in {block[0]}x{block[1]} blocks needs {expected}"
        )


def _buffer(out: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(f"out must be a contiguous {dtype} tensor of shape {list(shape)} on {device}")
    return out
