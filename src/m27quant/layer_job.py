"""One decoder layer of a quantization: read, calibrated, packed and made durable before the next one begins."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m27quant.calib.activations import Rows
from m27quant.calib.layer_ranges import LayerRanges, merged
from m27quant.calib.layerwise import count_tokens, run_attention, run_experts
from m27quant.calib.routing import Routings
from m27quant.checkpoint import names
from m27quant.checkpoint.durable import fault_point
from m27quant.checkpoint.writer import ShardSet, WrittenFile
from m27quant.copy_job import copy_tensor
from m27quant.hidden_states import layer_rows, save_hidden, sum_rows
from m27quant.job import Job
from m27quant.layer_progress import Reporter as _Reporter
from m27quant.layer_statistics import LayerStatistics
from m27quant.pack import stream_experts
from m27quant.pack_stats import PackStats, merged_stats
from m27quant.packing import Packing, plain_packing
from m27quant.plan import Unit, norm_and_router_names
from m27quant.recipes.algorithm import Method
from m27quant.runtime.layer import AttentionWeights, RouterWeights
from m27quant.runtime.loader import attention_weights, router_weights
from m27quant.scales import write_scales
from m27quant.shared import shared_shards

CALIBRATING: dict[Method, float] = {"awmse": 0.9, "gptq": 0.7}
"""Of a layer's time, where its experts are packed afterwards."""


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
    method = job.plan.resolved.algorithm
    full = job.plan.resolved.moe_calib == "full"
    with LayerStatistics(job) as statistics, layer_rows(job, hidden) as (rows, moe_out):
        later = statistics.decide_packing
        reporter = _Reporter(job, unit.layer, started, CALIBRATING.get(method, 1.0))
        with _shards(job, unit, written) if job.packs else nullcontext() as shards:
            router = router_weights(job.source, unit.layer, job.device)
            routed = _attention(job, unit.layer, shards, rows, router, ranges, reporter)
            experts = stream_experts(
                job.source,
                unit.layer,
                job.memory.expert_group,
                job.device,
                None if later else shards,
                stats,
                job.stop,
                ranks.owns,
                plain_packing(method),
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
                observers=statistics.observers,
            )
            record = statistics.narrow_inputs(unit.layer, ranges)
            if later and shards is not None:
                how, said = statistics.packing(unit.layer, routed)
                _pack_experts(job, unit.layer, shards, stats, reporter, how)
                record |= said
            found = ranks.gather("ranges", asdict(ranges), job.stop)
            if ranks.is_first and shards is not None:
                record |= _write_small(job, unit.layer, shards, merged([LayerRanges(**r) for r in found]))
            fault_point("layer-computed")
        next_rows = sum_rows(job, rows, moe_out)
        saved = None if last else save_hidden(job, unit.layer + 1, next_rows)
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
        how = plain_packing(job.plan.resolved.algorithm)
        _pack_experts(job, unit.layer, shards, stats, reporter, how)
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
    how: Packing,
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
        how=how,
        through=mine,
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


def _record(job: Job, ranges: LayerRanges, stats: PackStats) -> dict[str, Any]:
    """The layer's figures for the report, of all ranks together."""
    found = job.ranks.gather("packed", asdict(stats), job.stop)
    stats = merged_stats([PackStats(**s) for s in found], job.source.config.num_local_experts)
    return {
        "routed_tokens": ranges.routed_tokens,
        "seen_tokens": ranges.seen_tokens,
        "non_finite_activations": ranges.non_finite_values,
        **stats.figures(job.plan.resolved.algorithm),
    }
