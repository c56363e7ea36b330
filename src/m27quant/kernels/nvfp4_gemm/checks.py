"""What may be multiplied: packed matrices, rows of activations, static scales."""

from __future__ import annotations

import torch
from torch import Tensor

from m27quant.errors import CheckpointError
from m27quant.kernels.nvfp4_pack import GROUP, PackedNVFP4
from m27quant.kernels.nvfp4_quantize import is_usable

ACTIVATIONS = ("nvfp4", "bf16")


def check_activations(activations: str) -> None:
    """Refuse a mode that does not exist (a slip of the caller, hence ValueError)."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be 'nvfp4' or 'bf16', not {activations!r}")


def check_packed(packed: PackedNVFP4, shape: tuple[int, int] | None = None, name: str = "weight") -> None:
    """Refuse what is not a matrix in NVFP4, [N, K] = `shape` where given; `name` stands in the messages.

    Raises:
        CheckpointError: dtypes, shapes, a NaN block scale, a NaN or infinite global scale.
    """
    codes_NK2, scale_NG, scale_2 = packed
    if codes_NK2.dtype != torch.uint8 or codes_NK2.dim() != 2 or codes_NK2.numel() == 0:
        raise CheckpointError(f"{name}: NVFP4 codes must be U8 [N, K/2], are {_words(codes_NK2)}")
    N, K = codes_NK2.shape[0], codes_NK2.shape[1] * 2
    if K % GROUP:
        raise CheckpointError(f"{name} has {K} columns, not a multiple of {GROUP}")
    if shape is not None and shape != (N, K):
        raise CheckpointError(f"{name} has shape {[N, K]}, must be {list(shape)}")
    if scale_NG.dtype != torch.float8_e4m3fn or scale_NG.shape != (N, K // GROUP):
        raise CheckpointError(
            f"{name}: block scales must be float8_e4m3fn {[N, K // GROUP]}, are {_words(scale_NG)}"
        )
    if scale_2.dtype != torch.float32 or scale_2.numel() != 1:
        raise CheckpointError(f"{name}: weight_scale_2 must be one F32 number, is {_words(scale_2)}")
    if not (codes_NK2.device == scale_NG.device == scale_2.device):
        raise CheckpointError(f"{name}: codes, block scales and weight_scale_2 lie on different devices")
    if not bool(scale_2.isfinite()):
        raise CheckpointError(
            f"{name}: weight_scale_2 is {float(scale_2)}", hint="the checkpoint is damaged: run verify on it"
        )
    bad_NG = (scale_NG.view(torch.uint8) & 0x7F) == 0x7F
    if bool(bad_NG.any()):
        row, group = divmod(int(bad_NG.flatten().int().argmax()), bad_NG.shape[1])
        raise CheckpointError(
            f"{name}: {int(bad_NG.sum())} of {bad_NG.numel()} block scales are NaN, first at row {row}, group {group}",
            hint="the checkpoint is damaged: run verify on it",
        )


def check_rows(x_TK: Tensor, K: int, device: torch.device) -> None:
    """Refuse activations that do not fit a weight with K columns on `device`."""
    if x_TK.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"activations are {x_TK.dtype}, must be bfloat16 or float32")
    if x_TK.dim() != 2 or x_TK.shape[1] != K:
        raise ValueError(f"activations have shape {list(x_TK.shape)}, the weight needs [T, {K}]")
    if x_TK.device != device:
        raise ValueError(f"activations lie on {x_TK.device}, the weight on {device}")


def check_input_scale(input_scale: Tensor | None, device: torch.device) -> None:
    """Refuse a static scale that cannot be used; its value is looked at on a CPU alone."""
    if input_scale is None:
        raise ValueError("a W4A4 product needs the input_scale of its activations")
    if input_scale.dtype != torch.float32 or input_scale.dim() != 0 or input_scale.device != device:
        raise ValueError(f"input_scale must be F32 [] on {device}, is {_words(input_scale)}")
    if input_scale.device.type == "cpu" and not is_usable(input_scale):
        raise ValueError(f"input_scale must be positive with a finite reciprocal, is {float(input_scale)}")


def _words(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
