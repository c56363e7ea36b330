"""Rotary embedding and the norm before it in plain torch: the specification.  Shapes as in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from m27quant.kernels.rms_norm.reference import rms_norm


def rotate(x_THC: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """See the package."""
    r = cos_T1R.shape[-1]
    turned, passed = x_THC[..., :r], x_THC[..., r:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos_T1R + torch.cat((-second, first), dim=-1) * sin_T1R, passed), dim=-1)


def qk_norm_rope(
    q_TQ: Tensor,
    k_TX: Tensor,
    q_norm_Q: Tensor,
    k_norm_X: Tensor,
    cos_T1R: Tensor,
    sin_T1R: Tensor,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See the package."""
    q_THC, k_TJC = (
        rms_norm(x, weight, eps).view(len(x), x.shape[1] // head_dim, head_dim)
        for x, weight in ((q_TQ, q_norm_Q), (k_TX, k_norm_X))
    )
    return rotate(q_THC, cos_T1R, sin_T1R), rotate(k_TJC, cos_T1R, sin_T1R)
