"""What is to be known of one layer's inputs beside their largest values, of all ranks together, and what it is for."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import torch

from m27quant.calib.hessians import Hessians, LayerHessians, hessian_bytes, hessians_on_disk
from m27quant.calib.input_ranges import BlockMaxima, InputRange, block_maxima_bytes, block_maxima_on_disk
from m27quant.calib.layer_ranges import LayerRanges, merged
from m27quant.calib.layerwise import Observer, count_tokens
from m27quant.calib.moments import Moments, moments_bytes, moments_on_disk
from m27quant.calib.routing import Routings
from m27quant.checkpoint.config import M2Config
from m27quant.job import Job
from m27quant.packing import ByErrorFeedback, ByLeastError, Packing
from m27quant.recipes.algorithm import FULL_COVERAGE_METHODS, Method
from m27quant.shared import shared_sum

SCRATCH = "scratch-hessians"


class LayerStatistics:
    """The statistics that a run needs of one layer; to be left when every rank has packed by them."""

    def __init__(self, job: Job) -> None:
        config, device, method = job.source.config, job.device, job.plan.resolved.algorithm
        self._job = job
        self._moments = Moments(config, device) if method in FULL_COVERAGE_METHODS else None
        self._maxima = None if job.input_range.is_maximum else BlockMaxima(config, device)
        own = job.work / f"{SCRATCH}-{job.ranks.rank}"
        self._hessians = Hessians(config, device, own) if method == "gptq" else None
        self._open = ExitStack()
        if self._hessians is not None:
            self._open.enter_context(self._hessians)

    @property
    def observers(self) -> list[Observer]:
        """To be shown the experts' inputs."""
        wanted: tuple[Observer | None, ...] = (self._moments, self._maxima, self._hessians)
        return [observer for observer in wanted if observer is not None]

    @property
    def decide_packing(self) -> bool:
        """Whether packing has to wait for them."""
        return self._moments is not None

    def narrow_inputs(self, layer: int, ranges: LayerRanges) -> dict[str, Any]:
        """Give this rank's `ranges` what all ranks' tokens and the options make of them; what the report says of it."""
        if self._maxima is None:
            return {}
        job = self._job
        shared_sum(job.ranks, job.stop, job.work / f"maxima-{layer:04d}.bin", self._maxima.sums)
        limits = self._maxima.limits(job.input_range, shared=job.plan.resolved.moe_calib != "full")
        ranges.w13_input_amax, ranges.w2_input_amax = limits.w13, limits.w2
        return {"saturated_inputs": limits.saturated}

    def packing(self, layer: int, routed: Routings) -> tuple[Packing, dict[str, Any]]:
        """How to pack by what all ranks' tokens were, and what the report says of it."""
        assert self._moments is not None
        job = self._job
        counted = LayerRanges()
        count_tokens(routed, job.chunks, job.dropped, counted, full=True)
        everywhere = job.ranks.gather("counted", asdict(counted), job.stop)
        total = merged([LayerRanges(**counts) for counts in everywhere])
        shared_sum(job.ranks, job.stop, job.work / f"moments-{layer:04d}.bin", self._moments.sums)
        if self._hessians is not None:
            mean_squares = self._moments.mean_squares(total.seen_tokens[0])
            return ByErrorFeedback(self._feedback(layer, self._hessians, mean_squares)), {}
        channels = self._moments.weights(total.routed_tokens, total.seen_tokens[0])
        return ByLeastError(channels), {"moments_sha256": channels.sha256}

    def _feedback(self, layer: int, own: Hessians, mean_squares: torch.Tensor) -> LayerHessians:
        job = self._job
        inputs = own.finish()
        shared_sum(job.ranks, job.stop, job.work / f"hessians-{layer:04d}.bin", inputs)
        job.ranks.gather("hessians written", None, job.stop)
        files = [job.work / f"{SCRATCH}-{rank}" for rank in range(job.ranks.size)]
        found = LayerHessians(inputs, job.source.config, job.device, files, mean_squares)
        self._open.callback(found.close)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


def statistics_bytes(
    method: Method, input_range: InputRange, config: M2Config, device: torch.device
) -> tuple[int, int]:
    """Bytes that they take beside everything else, and for each expert of a group."""
    moments = moments_bytes(config, device) if method in FULL_COVERAGE_METHODS else 0
    maxima = 0 if input_range.is_maximum else block_maxima_bytes(config, device)
    hessians, per_expert = hessian_bytes(config, device) if method == "gptq" else (0, 0)
    return moments + maxima + hessians, per_expert


def statistics_on_disk(method: Method, input_range: InputRange, config: M2Config, ranks: int) -> int:
    """Bytes, at most, of the files in which they lie and through which several ranks add them up."""
    moments = moments_on_disk(config) if method in FULL_COVERAGE_METHODS else 0
    maxima = 0 if input_range.is_maximum else block_maxima_on_disk(config)
    inputs, activations = hessians_on_disk(config) if method == "gptq" else (0, 0)
    summed = max(moments, maxima, inputs) if ranks > 1 else 0
    return ranks * (summed + activations)
