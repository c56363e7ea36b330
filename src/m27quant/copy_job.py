"""The units that are only copied: the embedding, which gives the first hidden states too, and norm and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from m27quant.calib.activations import ROW_DTYPE, Chunk
from m27quant.calib.layerwise import drop_non_finite
from m27quant.calib.memory import PIECE_BYTES
from m27quant.checkpoint import names
from m27quant.checkpoint.source import Source
from m27quant.checkpoint.writer import ShardSet, WrittenFile, open_shards
from m27quant.hidden_states import save_hidden
from m27quant.job import Job
from m27quant.plan import Unit
from m27quant.runtime.loader import refuse_non_finite


def run_embed(job: Job, unit: Unit) -> dict[str, Any]:
    """Copy the embedding and look up every token's row: the first hidden states."""
    written = _copy_unit(job, unit) if job.packs else []
    hidden = save_hidden(job, 0, _embedded(job))
    return {"files": [f.to_json() for f in written], "hidden": hidden}


def _embedded(job: Job) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """Rows of the embedding, one small read per distinct token: the table itself is never in memory."""
    for chunk in job.chunks:
        job.stop()
        unique, where = torch.unique(job.sequences.ids[chunk.begin : chunk.end], return_inverse=True)
        table = torch.cat(
            [job.source.read_rows(names.EMBEDDING, int(i), int(i) + 1) for i in unique.tolist()]
        )
        yield chunk, drop_non_finite(chunk, table[where].to(ROW_DTYPE), job.dropped)


def run_head(job: Job, unit: Unit) -> dict[str, Any]:
    """Copy the final norm and the head."""
    return {"files": [f.to_json() for f in _copy_unit(job, unit)]}


def _copy_unit(job: Job, unit: Unit) -> list[WrittenFile]:
    written: list[WrittenFile] = []
    if not job.ranks.is_first:
        return written
    with open_shards(job.work, unit.name, list(unit.shards), written) as shards:
        for shard in unit.shards:
            for name in shard.offsets:
                copy_tensor(job.source, name, shards, job.stop)
    return written


def copy_tensor(source: Source, name: str, shards: ShardSet, stop: Callable[[], None]) -> None:
    """Pass a tensor through byte for byte, in pieces, refusing NaN and Inf."""
    info = source.info(name)
    row_bytes = max(1, info.nbytes // info.shape[0])
    step = max(1, PIECE_BYTES // row_bytes)
    for begin in range(0, info.shape[0], step):
        stop()
        piece = source.read_rows(name, begin, min(begin + step, info.shape[0]))
        refuse_non_finite(name, piece)
        shards.write_part(name, piece, begin * row_bytes)
