"""Products in plain torch: the specification.

Shapes: T rows, K in features, N out features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """x w^T in F32, rounded once to x's dtype; the order of the sum is torch's."""
    if x_TK.dtype == w_NK.dtype:
        return F.linear(x_TK, w_NK)
    return F.linear(x_TK.float(), w_NK.float()).to(x_TK.dtype)


def linear_invariant(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """The same, one row at a time: nothing that happens to a row depends on the others."""
    w_F32 = w_NK.float()
    rows = [torch.mv(w_F32, x_K.float()).to(x_TK.dtype) for x_K in x_TK]
    return torch.stack(rows) if rows else x_TK.new_zeros(0, len(w_NK))
