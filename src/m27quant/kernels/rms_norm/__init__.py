"""Root-mean-square norm over the last dimension.  Shapes: ... any leading sides, D the normed one."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from m27quant.kernels.dispatch import choose
from m27quant.kernels.rms_norm import reference

__all__ = ["check", "rms_norm"]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, [..., D] in x's dtype; a row's result depends on that row alone.

    The normalised value is rounded to x's dtype before it meets the weight.  The squares are summed in F64 and the
    mean rounded once to F32, so that the order of the sum does not show and every backend gives the same bits.

    Args:
        x: BF16 or F32 [..., D], D at least 1.
        weight_D: BF16 or F32 [D], on x's device.
        eps: added to the mean, as F32.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit.
    """
    check(x, weight_D)
    result: Tensor = _backend(x).rms_norm(x, weight_D, eps)
    return result


def check(x: Tensor, weight_D: Tensor) -> None:
    """Refuse what cannot be normed.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit.
    """
    for name, tensor in (("x", x), ("the norm's weight", weight_D)):
        if tensor.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"{name} is {tensor.dtype}: rms_norm takes bfloat16 and float32")
    if x.dim() < 1 or x.shape[-1] < 1 or weight_D.shape != x.shape[-1:]:
        raise ValueError(
            f"x {list(x.shape)} needs a norm weight of its last side; it is {list(weight_D.shape)}"
        )
    if x.device != weight_D.device:
        raise ValueError(f"x is on {x.device}, the norm's weight on {weight_D.device}: move one of them")


def _backend(tensor: Tensor) -> ModuleType:
    backend = choose("rms_norm", tensor.device).backend
    if backend == "cpu-native":
        from m27quant.kernels.rms_norm import cpu

        return cpu
    if backend == "triton":
        from m27quant.kernels.rms_norm import gpu

        return gpu
    return reference
