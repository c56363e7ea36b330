"""Products in plain torch: the specification.

Shapes: T rows, K in features, N out features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_STRIP_ELEMENTS = 1 << 22  # bounds the intermediate products to 16 MiB


def linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """x w^T in F32, rounded once to x's dtype; the order of the sum is torch's."""
    if x_TK.dtype == w_NK.dtype:
        return F.linear(x_TK, w_NK)
    return F.linear(x_TK.float(), w_NK.float()).to(x_TK.dtype)


def linear_invariant(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """The same, one row at a time, each sum by itself: `torch.mv` minds where in memory its operands lie."""
    y_TN = torch.empty(len(x_TK), len(w_NK), dtype=x_TK.dtype, device=x_TK.device)
    step = max(_STRIP_ELEMENTS // max(w_NK.shape[1], 1), 1)
    for n in range(0, len(w_NK), step):
        w_F32 = w_NK[n : n + step].float().contiguous()
        for t, x_K in enumerate(x_TK):
            y_TN[t, n : n + step] = (w_F32 * x_K.float()).sum(-1)
    return y_TN
