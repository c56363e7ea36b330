"""What may be multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32)


def check(x_TK: Tensor, w_NK: Tensor) -> None:
    """Refuse tensors that do not make a product.

    Raises:
        ValueError: not two matrices in BF16 or F32 with equal K on one device.
    """
    for name, tensor in (("x", x_TK), ("the weight", w_NK)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: linear takes bfloat16 and float32")
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: linear takes matrices")
    if x_TK.shape[1] != w_NK.shape[1]:
        raise ValueError(f"x {list(x_TK.shape)} and the weight {list(w_NK.shape)} differ in their last side")
    if x_TK.device != w_NK.device:
        raise ValueError(f"x is on {x_TK.device}, the weight on {w_NK.device}: move one of them")
