"""Data parallel training: each rank learns from a part of every batch, and all make the same step.

Started by torchrun; over NCCL on GPUs and Gloo elsewhere.  What is reduced are sums (of gradients, losses, counts), so
that it does not matter how a batch is split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from m27quant.errors import EnvironmentFault, M27Error
from m27quant.runtime.parallel import Ranks

T = TypeVar("T")


def add_up(tensors: Iterable[Tensor], ranks: Ranks) -> None:
    """Replace every tensor by the sum of all ranks'.

    Raises:
        EnvironmentFault: another rank is gone.
    """
    if ranks.size > 1:
        with _reaching(ranks):
            for tensor in tensors:
                dist.all_reduce(tensor)


def by_first(ranks: Ranks, do: Callable[[], T]) -> T:
    """What `do` gives on the first rank, on all of them; a fault of it is raised on all.  Plain Python data only.

    Raises:
        EnvironmentFault: another rank is gone.
    """
    if ranks.size == 1:
        return do()
    box: list[Any] = [None, None]
    if ranks.rank == 0:
        try:
            box[0] = do()
        except M27Error as fault:
            box[1] = fault
    with _reaching(ranks):
        dist.broadcast_object_list(box, 0)
    result, found = box
    if found is not None:
        raise found
    return result  # type: ignore[no-any-return]  # as it was sent


@contextmanager
def _reaching(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except RuntimeError as fault:
        line = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise EnvironmentFault(
            f"rank {ranks.rank} of {ranks.size} cannot reach the others: {line}",
            hint="see what the rank that ended first said; then run all of them again with --resume",
        ) from None
