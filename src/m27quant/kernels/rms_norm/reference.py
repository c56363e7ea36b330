"""Root-mean-square norm in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See the package.  1 / sqrt, both correctly rounded.

    `torch.rsqrt` is an approximation on CUDA, and torch's F32 root on a CPU is one step off for a fifth of all
    numbers; the root in F64, rounded once, is the right one.
    """
    mean = x.double().square().mean(-1, keepdim=True).float()
    normed = (x.float() * (1.0 / torch.sqrt((mean + eps).double()).float())).to(x.dtype)
    return (weight_D.float() * normed.float()).to(x.dtype)
