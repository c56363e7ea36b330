"""One unit of a quantization: what is read, calibrated, packed and made durable before the next one begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m27quant.calib.activations import ROW_DTYPE, Chunk, FileRows, MemoryRows, Rows, load_rows, save_rows
from m27quant.calib.input_ranges import BlockMaxima
from m27quant.calib.layerwise import (
    LayerRanges,
    count_tokens,
    drop_non_finite,
    merged,
    run_attention,
    run_experts,
)
from m27quant.calib.memory import PIECE_BYTES
from m27quant.calib.moments import ChannelWeights, Moments
from m27quant.calib.routing import Routings
from m27quant.checkpoint import names
from m27quant.checkpoint.durable import fault_point, move_durably, sha256_of
from m27quant.checkpoint.source import Source
from m27quant.checkpoint.writer import ShardSet, WrittenFile, open_shards
from m27quant.job import Job
from m27quant.layer_progress import Reporter as _Reporter
from m27quant.layer_statistics import channel_weights, narrow_inputs
from m27quant.pack import PackStats, block_scales, merged_stats, relative_errors, stream_experts
from m27quant.plan import Unit, norm_and_router_names
from m27quant.runtime.layer import AttentionWeights, RouterWeights
from m27quant.runtime.loader import attention_weights, refuse_non_finite, router_weights
from m27quant.scales import write_scales
from m27quant.shared import shared_file, shared_shards

CALIBRATING = 0.9
"""Of a layer's time, where its experts are packed afterwards."""


# -- embedding and head ----------------------------------------------------------------------------


def run_embed(job: Job, unit: Unit) -> dict[str, Any]:
    """Copy the embedding and look up every token's row: the first hidden states."""
    written = _copy_unit(job, unit) if job.packs else []
    hidden = _save_hidden(job, 0, _embedded(job))
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


# -- one decoder layer -----------------------------------------------------------------------------


def run_layer(job: Job, unit: Unit, hidden: Path, *, last: bool) -> dict[str, Any]:
    """Calibrate one decoder layer, and pack it; returns its journal entry, which counts on the first rank.

    Each rank takes its own chunks through all experts, and packs its own experts.  Reads each source tensor once, or
    experts a second time where their packing needs what the calibration has found.
    Memory: hidden states (or chunks of them), one group of experts.
    """
    assert unit.layer is not None
    ranks, ranges, stats = job.ranks, LayerRanges(), PackStats()
    written: list[WrittenFile] = []
    started = time.monotonic()
    full = job.plan.resolved.moe_calib == "full"
    moments = Moments(job.source.config, job.device) if job.plan.resolved.algorithm == "awmse" else None
    maxima = None if job.input_range.is_maximum else BlockMaxima(job.source.config, job.device)
    with _layer_rows(job, hidden) as (rows, moe_out):
        reporter = _Reporter(job, unit.layer, started, CALIBRATING if moments else 1.0)
        with _shards(job, unit, written) if job.packs else nullcontext() as shards:
            router = router_weights(job.source, unit.layer, job.device)
            routed = _attention(job, unit.layer, shards, rows, router, ranges, reporter)
            experts = stream_experts(
                job.source,
                unit.layer,
                job.memory.expert_group,
                job.device,
                None if moments else shards,
                stats,
                job.stop,
                ranks.owns,
                block_scales(job.plan.resolved.algorithm),
            )
            run_experts(
                experts,
                job.chunks,
                rows,
                moe_out,
                routed,
                router,
                job.source.config,
                ranges,
                full=full,
                tick=reporter.expert,
                observers=[observer for observer in (moments, maxima) if observer is not None],
            )
            record: dict[str, Any] = {}
            if maxima is not None:
                record["saturated_inputs"] = narrow_inputs(job, unit.layer, maxima, ranges)
            if moments is not None and shards is not None:
                channels = channel_weights(job, unit.layer, routed, moments)
                _pack_experts(job, unit.layer, shards, stats, reporter, channels)
                record["moments_sha256"] = channels.sha256
            found = ranks.gather("ranges", asdict(ranges), job.stop)
            if ranks.is_first and shards is not None:
                record |= _write_small(job, unit.layer, shards, merged([LayerRanges(**r) for r in found]))
            fault_point("layer-computed")
        next_rows = _sum_rows(job, rows, moe_out)
        saved = None if last else _save_hidden(job, unit.layer + 1, next_rows)
        if last:  # still look whether the last layer's output is finite
            for _ in next_rows:
                pass
    count_tokens(routed, job.chunks, job.dropped, ranges, full=full)
    total = merged([LayerRanges(**r) for r in ranks.gather("figures", asdict(ranges), job.stop)])
    entry: dict[str, Any] = {"files": [f.to_json() for f in written]}
    if job.packs:
        entry["record"] = record | _record(job, total, stats)
    else:
        entry["ranges"] = asdict(total)
    return entry | ({"hidden": saved} if saved else {})


def pack_layer(job: Job, unit: Unit, ranges: LayerRanges) -> dict[str, Any]:
    """Pack one decoder layer by ranges that are known; returns its journal entry."""
    assert unit.layer is not None
    stats = PackStats()
    written: list[WrittenFile] = []
    record: dict[str, Any] = {}
    reporter = _Reporter(job, unit.layer, time.monotonic(), calibrated=0.0)
    with _shards(job, unit, written) as shards:
        _pack_experts(job, unit.layer, shards, stats, reporter)
        if job.ranks.is_first:
            _write_attention(attention_weights(job.source, unit.layer, job.device), unit.layer, shards)
            record = _write_small(job, unit.layer, shards, ranges)
        fault_point("layer-computed")
    return {"files": [f.to_json() for f in written], "record": record | _record(job, ranges, stats)}


def _pack_experts(
    job: Job,
    layer: int,
    shards: ShardSet,
    stats: PackStats,
    reporter: _Reporter,
    channels: ChannelWeights | None = None,
) -> None:
    """Pack this rank's experts, without tokens."""
    mine = [e for e in range(job.source.config.num_local_experts) if job.ranks.owns(e)]
    packed = stream_experts(
        job.source,
        layer,
        1,
        job.device,
        shards,
        stats,
        job.stop,
        scales=block_scales(job.plan.resolved.algorithm),
        through=mine,
        channels=channels,
    )
    for number, _ in enumerate(packed, start=1):
        reporter.packed(number / len(mine))


def _shards(job: Job, unit: Unit, written: list[WrittenFile]) -> AbstractContextManager[ShardSet]:
    return shared_shards(job.ranks, job.stop, job.work, unit.name, list(unit.shards), written)


def _write_attention(weights: AttentionWeights, layer: int, shards: ShardSet) -> None:
    for projection in names.ATTENTION_PROJECTIONS:
        shards.write(f"{names.attention(layer)}.{projection}.weight", getattr(weights, projection))


def _write_small(job: Job, layer: int, shards: ShardSet, ranges: LayerRanges) -> dict[str, Any]:
    """Norms and router as they are, and the scales that `ranges` give; returns what the report says of these."""
    for name in norm_and_router_names(job.source.config, layer):
        copy_tensor(job.source, name, shards, job.stop)
    return write_scales(job.source.config, job.plan.resolved.kv_cache, layer, shards, ranges)


def _attention(
    job: Job,
    layer: int,
    shards: ShardSet | None,
    rows: Rows,
    router: RouterWeights,
    ranges: LayerRanges,
    reporter: _Reporter,
) -> Routings:
    """Read attention once: its BF16 weights go to the shard and through the tokens."""
    weights = attention_weights(job.source, layer, job.device)
    if job.ranks.is_first and shards is not None:
        _write_attention(weights, layer, shards)
    return run_attention(
        job.chunks, rows, weights, router, job.source.config, ranges, job.dropped, reporter.attention
    )


@contextmanager
def _layer_rows(job: Job, hidden: Path) -> Iterator[tuple[Rows, Rows]]:
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


def _sum_rows(job: Job, rows: Rows, moe_out: Rows) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """The layer's output, chunk by chunk."""
    for chunk in job.chunks:
        yield chunk, drop_non_finite(chunk, rows.read(chunk) + moe_out.read(chunk), job.dropped)


def _save_hidden(job: Job, layer: int, rows: Iterator[tuple[Chunk, torch.Tensor]]) -> dict[str, Any]:
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


def _record(job: Job, ranges: LayerRanges, stats: PackStats) -> dict[str, Any]:
    """The layer's figures for the report, of all ranks together."""
    found = job.ranks.gather("packed", asdict(stats), job.stop)
    stats = merged_stats([PackStats(**s) for s in found], job.source.config.num_local_experts)
    packing = {k: v for k, v in asdict(stats).items() if k != "weighted" and (k != "max_sqnr_db" or v)}
    if errors := relative_errors(stats):
        packing["weighted_error"] = errors
    return {
        "routed_tokens": ranges.routed_tokens,
        "seen_tokens": ranges.seen_tokens,
        "non_finite_activations": ranges.non_finite_values,
        **packing,
    }
