"""Data parallel training: each rank learns from a part of every batch, and all make the same step.

Started by torchrun; over NCCL on GPUs and Gloo elsewhere.  What is reduced are sums (of gradients, losses, counts), so
that it does not matter how a batch is split.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from m27quant.runtime.parallel import Ranks


def add_up(tensors: Iterable[Tensor], ranks: Ranks) -> None:
    """Replace every tensor by the sum of all ranks'."""
    if ranks.size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def told_by_first(value: Any, ranks: Ranks) -> Any:
    """The first rank's value, on all of them; only plain Python data."""
    if ranks.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def leave(ranks: Ranks) -> None:
    """End the group that `join` made."""
    if ranks.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
