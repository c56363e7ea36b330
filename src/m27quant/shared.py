"""Files that all ranks write together: the first makes and names them, each writes and syncs its own bytes.

The first rank renames a file only when every rank has synced what it wrote, so a name still means a whole file.  On a
network file system that needs what NFS calls close-to-open: who opens a file sees what was there when others closed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.durable import (
    durable_file,
    joined_file,
    pwrite_all,
    raise_for_os_error,
    temporary_path,
)
from m27quant.checkpoint.header import pread_exactly
from m27quant.checkpoint.writer import ShardPlan, ShardSet, WrittenFile, join_shards, open_shards
from m27quant.distributed.ranks import Ranks
from m27quant.errors import escape

Stop = Callable[[], None]


@contextmanager
def shared_file(ranks: Ranks, stop: Stop, path: Path, size: int) -> Iterator[int]:
    """`durable_file`, for all ranks to write parts of it."""
    if ranks.is_first:
        with durable_file(path, size) as fd:
            ranks.share("file begun", temporary_path(path).name, stop)
            yield fd
            ranks.gather("file written", None, stop)
    else:
        with joined_file(path.with_name(ranks.share("file begun", None, stop))) as fd:
            yield fd
        ranks.gather("file written", None, stop)


@contextmanager
def shared_shards(
    ranks: Ranks, stop: Stop, folder: Path, stem: str, plans: list[ShardPlan], written: list[WrittenFile]
) -> Iterator[ShardSet]:
    """`open_shards`, for each rank to write its own tensors; `written` is filled on the first."""
    if ranks.is_first:
        with open_shards(folder, stem, plans, written) as shards:
            ranks.share("shards begun", [path.name for path in shards.files], stop)
            yield shards
            for names in ranks.gather("shards written", None, stop)[1:]:
                shards.written_elsewhere(names)
    else:
        files = ranks.share("shards begun", None, stop)
        with join_shards([folder / name for name in files], plans) as shards:
            yield shards
        ranks.gather("shards written", shards.written(), stop)


def shared_sum(ranks: Ranks, stop: Stop, path: Path, mine: torch.Tensor) -> None:
    """Make `mine`, whole numbers of one shape on every rank, the sum of all ranks', through a file: messages are small.

    `path` is gone afterwards.
    """
    if ranks.size == 1:
        return
    part = mine.cpu().clone(memory_format=torch.contiguous_format)
    size = part.numel() * part.element_size()
    with shared_file(ranks, stop, path, ranks.size * size) as fd:
        try:
            pwrite_all(fd, byte_view(part), ranks.rank * size)
        except OSError as fault:
            raise_for_os_error(fault, path)
    ranks.gather("sum written", None, stop)  # only now the file has its name
    with path.open("rb") as file:
        for rank in range(ranks.size):
            if rank != ranks.rank:
                pread_exactly(file.fileno(), byte_view(part), rank * size, escape(path))
                mine += part.to(mine.device)
    ranks.gather("sum read", None, stop)
    if ranks.is_first:
        path.unlink()
