"""What the statistics of one layer, of all ranks together, make of its packing."""

from __future__ import annotations

from dataclasses import asdict

from m27quant.calib.input_ranges import BlockMaxima
from m27quant.calib.layerwise import LayerRanges, count_tokens, merged
from m27quant.calib.moments import ChannelWeights, Moments
from m27quant.calib.routing import Routings
from m27quant.job import Job
from m27quant.shared import shared_sum


def channel_weights(job: Job, layer: int, routed: Routings, moments: Moments) -> ChannelWeights:
    """What errors count, by what all ranks' tokens were."""
    counted = LayerRanges()
    count_tokens(routed, job.chunks, job.dropped, counted, full=True)
    everywhere = job.ranks.gather("counted", asdict(counted), job.stop)
    total = merged([LayerRanges(**counts) for counts in everywhere])
    shared_sum(job.ranks, job.stop, job.work / f"moments-{layer:04d}.bin", moments.sums)
    return moments.weights(total.routed_tokens, total.seen_tokens[0])


def narrow_inputs(job: Job, layer: int, maxima: BlockMaxima, ranges: LayerRanges) -> dict[str, float]:
    """Give this rank's `ranges` of inputs what all ranks' tokens and the options make of them; what then saturates."""
    shared_sum(job.ranks, job.stop, job.work / f"maxima-{layer:04d}.bin", maxima.sums)
    limits = maxima.limits(job.input_range, shared=job.plan.resolved.moe_calib != "full")
    ranges.w13_input_amax, ranges.w2_input_amax = limits.w13, limits.w2
    return limits.saturated
