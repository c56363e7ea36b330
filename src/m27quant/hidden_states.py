"""The hidden states of all calibration tokens between two layers: a durable file, and rows while a layer works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m27quant.calib.activations import Chunk, FileRows, MemoryRows, Rows, load_rows, save_rows
from m27quant.calib.layerwise import drop_non_finite
from m27quant.checkpoint.durable import move_durably, sha256_of
from m27quant.checkpoint.writer import WrittenFile
from m27quant.job import Job
from m27quant.shared import shared_file


@contextmanager
def layer_rows(job: Job, hidden: Path) -> Iterator[tuple[Rows, Rows]]:
    """Two sets of rows for one layer: the residual stream, loaded from `hidden`, and the experts' sum."""
    size = job.num_tokens, job.source.config.hidden_size
    pair: list[Rows] = []
    try:
        for name in ("residual", "experts"):
            if job.memory.rows_in_memory:
                pair.append(MemoryRows(*size, job.device, job.first_token))
            else:
                scratch = job.work / f"scratch-{name}-{job.ranks.rank}"
                pair.append(FileRows(scratch, *size, job.device, job.first_token))
        for chunk, rows in load_rows(hidden, job.chunks, size[1]):
            pair[0].write(chunk, rows)
        yield pair[0], pair[1]
    finally:
        for rows_ in pair:
            rows_.close()


def sum_rows(job: Job, rows: Rows, moe_out: Rows) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """The layer's output, chunk by chunk."""
    for chunk in job.chunks:
        yield chunk, drop_non_finite(chunk, rows.read(chunk) + moe_out.read(chunk), job.dropped)


def save_hidden(job: Job, layer: int, rows: Iterator[tuple[Chunk, torch.Tensor]]) -> dict[str, Any]:
    """Make the input of `layer` durable under a name that carries its content; the first rank knows it."""
    num_tokens, hidden_size = job.sequences.num_tokens, job.source.config.hidden_size
    size = num_tokens * hidden_size * 2
    unnamed = job.work / f"hidden-{layer:04d}.partial"
    save_rows(unnamed, rows, num_tokens, hidden_size, partial(shared_file, job.ranks, job.stop))
    if not job.ranks.is_first:
        return {}
    digest = sha256_of(unnamed)
    final = job.work / f"hidden-{layer:04d}.{digest[:16]}.bin"
    move_durably(unnamed, final)
    return dict(WrittenFile(final.name, size, digest).to_json())
