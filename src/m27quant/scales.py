"""From the ranges of a calibration to the scales of a checkpoint: the one place where they become bytes."""

from __future__ import annotations

from typing import Any

import torch

from m27quant.calib.layer_ranges import LayerRanges
from m27quant.checkpoint import names
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.writer import ShardSet

FP8_MAX = 448.0
NVFP4_MAX = 6.0 * FP8_MAX


def write_scales(
    config: M2Config, kv_cache: str | None, layer: int, shards: ShardSet, ranges: LayerRanges
) -> dict[str, Any]:
    """Write input and KV scales; returns them, and what was replaced because its range was zero."""
    replaced: list[str] = []

    def scale(module: str, amax: float, largest: float, maximum: float) -> torch.Tensor:
        if amax == 0.0:  # never seen alive: the widest range of its kind in the layer is the safe side
            replaced.append(module)
            amax = largest or maximum
        return torch.tensor(amax, dtype=torch.float32) / maximum

    largest_w2 = max(ranges.w2_input_amax)
    input_scale: dict[str, list[float]] = {p: [] for p in names.EXPERT_PROJECTIONS}
    for expert in range(config.num_local_experts):
        for projection in names.EXPERT_PROJECTIONS:
            module = names.expert(layer, expert, projection)
            amax = ranges.w2_input_amax[expert] if projection == "w2" else ranges.w13_input_amax
            largest = largest_w2 if projection == "w2" else ranges.w13_input_amax
            value = scale(module, amax, largest, NVFP4_MAX)
            shards.write(f"{module}.input_scale", value)
            input_scale[projection].append(float(value))
    record: dict[str, Any] = {"input_scale": input_scale}
    if kv_cache == "fp8":
        for name, amax in ((names.k_scale(layer), ranges.k_amax), (names.v_scale(layer), ranges.v_amax)):
            value = scale(name, amax, 0.0, FP8_MAX)
            shards.write(name, value)
            record[name.rpartition(".")[2]] = float(value)
    return record | {"zero_range": replaced}
