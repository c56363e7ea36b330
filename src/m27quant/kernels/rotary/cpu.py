"""Rotary embedding, and the query/key norm before it, by `_native/norm.c`: the bits of `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from m27quant.kernels.rms_norm.cpu import norm_rope


def rotate(x_THC: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """See `reference.rotate`."""
    C = x_THC.shape[2]
    out_THC = torch.empty(x_THC.shape, dtype=x_THC.dtype)
    norm_rope(x_THC.flatten(1), None, 0.0, (cos_T1R, sin_T1R), C, out_THC)
    return out_THC


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
    """See `reference.qk_norm_rope`."""
    out = []
    for x, weight in ((q_TQ, q_norm_Q), (k_TX, k_norm_X)):
        out.append(torch.empty(len(x), x.shape[1] // head_dim, head_dim, dtype=x.dtype))
        norm_rope(x, weight, eps, (cos_T1R, sin_T1R), head_dim, out[-1])
    return out[0], out[1]
