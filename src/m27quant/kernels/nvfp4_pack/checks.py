"""What may be packed: dtypes, shapes, block scales, and where the first NaN or Inf lies."""

from __future__ import annotations

import torch
from torch import Tensor

from m27quant.errors import CheckpointError
from m27quant.kernels.fp8_dequant import check_blocks
from m27quant.kernels.nvfp4_pack import reference

BF16_SMALLEST = 2.0**-133
"""The smallest positive BF16 number: no weight has a smaller amax but 0."""


def check_weight(weight_NK: Tensor, scale_inv_IJ: Tensor | None, block: tuple[int, int]) -> None:
    """Refuse what is not a BF16 matrix, nor an FP8 one with its block scales.

    Raises:
        CheckpointError: dtype, shape, a K that 16 does not divide, a NaN, infinite or negative block scale.
    """
    if scale_inv_IJ is not None:
        check_blocks(weight_NK, scale_inv_IJ, block)
        _check_scales(scale_inv_IJ)
    elif weight_NK.dtype == torch.float8_e4m3fn:
        raise CheckpointError("weight is FP8 but has no weight_scale_inv")
    elif weight_NK.dtype != torch.bfloat16:
        raise CheckpointError(
            f"weight is {weight_NK.dtype}, NVFP4 packing takes FP8 or BF16",
            hint="convert the checkpoint to BF16 first: rounding is a choice of its owner",
        )
    elif weight_NK.dim() != 2 or weight_NK.numel() == 0:
        raise CheckpointError(f"weight has shape {list(weight_NK.shape)}, must be a matrix with elements")
    if weight_NK.shape[1] % reference.GROUP:
        raise CheckpointError(f"weight has {weight_NK.shape[1]} columns, not a multiple of {reference.GROUP}")


def check_amax(amax: Tensor) -> None:
    """Refuse an amax that no BF16 weight can have (a slip of the caller, hence ValueError)."""
    if amax.dtype != torch.float32 or amax.dim() != 0:
        raise ValueError(f"amax must be a float32 scalar tensor, is {amax.dtype} {list(amax.shape)}")
    value = float(amax)
    if not (value == 0 or BF16_SMALLEST <= value < float("inf")):
        raise ValueError(f"amax must be 0 or a finite number from {BF16_SMALLEST:g} on, is {value:g}")


def channel_weights(channel_weight: Tensor | None, weight_NK: Tensor) -> Tensor | None:
    """The weights of squared errors as the search takes them: a group of zeros becomes one of ones."""
    if channel_weight is None:
        return None
    K = weight_NK.shape[1]
    if channel_weight.dtype != torch.float32 or channel_weight.shape != (K,):
        found = f"{channel_weight.dtype} {list(channel_weight.shape)}"
        raise ValueError(f"channel_weight must be a float32 tensor of shape [{K}], is {found}")
    if not bool((channel_weight.isfinite() & (channel_weight >= 0)).all()):
        raise ValueError("channel_weight must be finite and not negative")
    groups = channel_weight.to(weight_NK.device).view(-1, reference.GROUP)
    dead = (groups == 0).all(1, keepdim=True)
    return torch.where(dead, torch.ones_like(groups), groups).flatten()


def nonfinite_error(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, block: tuple[int, int]
) -> CheckpointError:
    """The error that says how many weights are NaN or Inf and where the first lies.

    An FP8 code whose product with its scale overflows BF16 counts as infinite.
    """
    count, first = 0, (0, 0)
    for rows in reference.strips(weight_NK, block):
        bad_RK = ~reference.bf16_rows(weight_NK, scale_inv_IJ, rows, block).isfinite()
        found = int(bad_RK.sum())
        if found and not count:
            row, column = divmod(int(bad_RK.flatten().int().argmax()), weight_NK.shape[1])
            first = (rows.start + row, column)
        count += found
    return CheckpointError(
        f"{count} of {weight_NK.numel()} weights are NaN or infinite, "
        f"first at row {first[0]}, column {first[1]}",
        hint="the file is damaged, or its weights were never finite: download it again",
    )


def _check_scales(scale_inv_IJ: Tensor) -> None:
    bad_IJ = ~(scale_inv_IJ.isfinite() & (scale_inv_IJ >= 0))
    count = int(bad_IJ.sum())
    if count:
        row, column = divmod(int(bad_IJ.flatten().int().argmax()), scale_inv_IJ.shape[1])
        raise CheckpointError(
            f"{count} of {scale_inv_IJ.numel()} values of weight_scale_inv are NaN, infinite or negative, "
            f"first at row {row}, column {column}: {float(scale_inv_IJ[row, column])}",
            hint="the file is damaged: download it again",
        )
