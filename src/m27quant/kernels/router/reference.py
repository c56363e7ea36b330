"""Choice and weights of experts in plain torch: the specification.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select(logits_TE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Experts [T, K] I64 and weights [T, K] F32; see the package's `route`."""
    # in F64: torch's F32 exp has another last bit for elements that do not fill a vector register
    scores_TE = torch.sigmoid(logits_TE.double()).float()
    # stable: of equal ones the lower index comes first; topk leaves it open
    order_TE = torch.sort(scores_TE + bias_E, dim=-1, descending=True, stable=True).indices
    experts_TK = order_TE[:, :k].contiguous()
    weights_TK = scores_TE.gather(1, experts_TK)
    total_T = weights_TK[:, 0]
    for slot in range(1, k):
        total_T = total_T + weights_TK[:, slot]
    return experts_TK, weights_TK / total_T[:, None]
