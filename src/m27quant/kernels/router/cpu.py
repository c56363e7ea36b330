"""Choice and weights of experts by the compiled core, `_native/router.c`."""

from __future__ import annotations

import torch
from torch import Tensor

from m27quant.kernels import native


def select(logits_TE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `reference.select`; the sigmoid is the same for a logit wherever it stands, which torch's is not."""
    logits_TE, bias_E = logits_TE.contiguous(), bias_E.contiguous()
    T, E = logits_TE.shape
    experts_TK, weights_TK = torch.empty(T, k, dtype=torch.int64), torch.empty(T, k)
    core = native.function("m27_router_select")
    pointers = [x.data_ptr() for x in (logits_TE, bias_E)], [x.data_ptr() for x in (experts_TK, weights_TK)]

    def rows(first: int, end: int) -> None:
        wish_E = torch.empty(E)
        core(*pointers[0], E, k, *pointers[1], wish_E.data_ptr(), first, end)

    native.over_rows(rows, T, 1, E * k * 4)
    return experts_TK, weights_TK
