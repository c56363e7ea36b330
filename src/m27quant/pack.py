"""One expert at a time from the source: FP8 bytes in, NVFP4 tensors to the shard, BF16 weights to calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from m27quant.calib.layerwise import ExpertWeights
from m27quant.calib.moments import ChannelWeights
from m27quant.checkpoint import names
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.source import Source
from m27quant.checkpoint.writer import ShardSet
from m27quant.errors import CheckpointError
from m27quant.kernels import fp8_dequant, nvfp4_pack
from m27quant.kernels.nvfp4_pack.weighted import weighted_error
from m27quant.recipes.schema import Method
from m27quant.runtime.loader import read_linear

Stored = tuple[torch.Tensor, torch.Tensor | None]
"""A linear as it is stored: weight [N, K] in FP8 or BF16, and its block scales."""
Packed = dict[str, nvfp4_pack.PackedNVFP4]
"""The linears of an expert by module name."""


@dataclass(slots=True)
class PackStats:
    """Per projection and expert what packing found; lists run over experts."""

    sqnr_db: dict[str, list[float | None]] = field(
        default_factory=lambda: {p: [] for p in names.EXPERT_PROJECTIONS}
    )
    """None where the matrix is all zero."""
    weight_scale_2: dict[str, list[float]] = field(
        default_factory=lambda: {p: [] for p in names.EXPERT_PROJECTIONS}
    )
    max_sqnr_db: dict[str, list[float | None]] = field(default_factory=dict)
    """What `sqnr_db` would be under block scales from maxima; empty where it is that."""
    weighted: dict[str, list[list[float]]] = field(default_factory=dict)
    """Signal, noise, and noise under block scales from maxima, squares counted by channel weights; empty without."""
    zero_groups: int = 0
    saturated_groups: int = 0
    tiny_groups: int = 0
    dead: list[str] = field(default_factory=list)
    """Expert matrices that are all zero."""


def merged_stats(parts: Sequence[PackStats], num_experts: int) -> PackStats:
    """The figures of ranks that were dealt the experts one by one, in the order of experts."""
    size, projections = len(parts), names.EXPERT_PROJECTIONS

    def dealt(field: str) -> dict[str, Any]:
        by_rank = [getattr(part, field) for part in parts]
        if not by_rank[0]:
            return {}
        return {p: [by_rank[e % size][p][e // size] for e in range(num_experts)] for p in projections}

    dead = {module for part in parts for module in part.dead}
    order = [(module, module.split(".")) for module in dead]
    return PackStats(
        sqnr_db=dealt("sqnr_db"),
        weight_scale_2=dealt("weight_scale_2"),
        max_sqnr_db=dealt("max_sqnr_db"),
        weighted=dealt("weighted"),
        zero_groups=sum(part.zero_groups for part in parts),
        saturated_groups=sum(part.saturated_groups for part in parts),
        tiny_groups=sum(part.tiny_groups for part in parts),
        dead=[module for module, _ in sorted(order, key=lambda m: (int(m[1][-2]), m[1][-1]))],
    )


def read_expert(source: Source, layer: int, expert: int, device: torch.device) -> dict[str, Stored]:
    """w1, w2 and w3 of one expert as stored."""
    return {p: read_linear(source, names.expert(layer, expert, p), device) for p in names.EXPERT_PROJECTIONS}


def stream_experts(
    source: Source,
    layer: int,
    group: int,
    device: torch.device,
    shards: ShardSet | None,
    stats: PackStats,
    should_stop: Callable[[], None],
    is_mine: Callable[[int], bool] = lambda expert: True,
    scales: nvfp4_pack.Scales = "max",
    through: Sequence[int] | None = None,
    channels: ChannelWeights | None = None,
) -> Iterator[Sequence[ExpertWeights]]:
    """Pack and write every expert that is this rank's; yields the BF16 weights of all, `group` experts at a time.

    `through` names the experts to read, in their order; all where None.  `channels` weight the errors of `scales`.

    While an expert is worked on, the next is read and the last is written.  Each source byte is read once.
    What was yielded is overwritten when the next group is asked for: fresh memory would cost more than packing.

    Raises:
        CheckpointError: NaN, Inf or a bad block scale in the source, naming the tensor.
    """
    experts = list(range(source.config.num_local_experts)) if through is None else list(through)
    if not experts:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read-write") as files:
        ahead = files.submit(read_expert, source, layer, experts[0], device)
        behind: Future[None] | None = None
        batch: list[ExpertWeights] = []
        buffers = [bf16_buffers(source.config, device) for _ in range(min(group, len(experts)))]
        for expert, following in zip(experts, [*experts[1:], None], strict=True):
            should_stop()
            stored = ahead.result()
            if following is not None:
                ahead = files.submit(read_expert, source, layer, following, device)
            if shards is not None and is_mine(expert):
                packed, weights = pack_expert(
                    source,
                    layer,
                    expert,
                    stored,
                    stats,
                    buffers[len(batch)],
                    scales,
                    channels.of(expert) if channels else {},
                )
                if behind is not None:
                    behind.result()
                behind = files.submit(write_expert, shards, packed)
            else:
                weights = plain_expert(source, expert, stored, buffers[len(batch)])
            batch.append(weights)
            del stored
            if len(batch) == group or following is None:
                if behind is not None:
                    behind.result()  # nothing may be underway when the caller fails and the files are closed
                yield batch
                batch.clear()


def bf16_buffers(config: M2Config, device: torch.device) -> dict[str, torch.Tensor]:
    """Room for the three dequantized matrices of one expert; no memory until they are written to."""
    shapes = names.expert_shapes(config)
    return {p: torch.empty(shape, dtype=torch.bfloat16, device=device) for p, shape in shapes.items()}


def pack_expert(
    source: Source,
    layer: int,
    expert: int,
    stored: dict[str, Stored],
    stats: PackStats,
    buffers: dict[str, torch.Tensor],
    scales: nvfp4_pack.Scales = "max",
    channels: Mapping[str, torch.Tensor] = {},
) -> tuple[Packed, ExpertWeights]:
    """One expert in NVFP4, w1 and w3 with one `weight_scale_2`, and in BF16: in `buffers`, or as it is stored.

    `channels` have by projection what the squared errors of columns count, F32 [K].
    """
    block = source.config.weight_block_size or fp8_dequant.BLOCK
    amax = {}
    for projection, (weight, scale) in stored.items():
        with Naming(names.expert(layer, expert, projection)):
            amax[projection] = nvfp4_pack.amax(weight, scale, block=block)
    amax["w1"] = amax["w3"] = torch.maximum(amax["w1"], amax["w3"])
    result: Packed = {}
    for projection, (weight, scale) in stored.items():
        module = names.expert(layer, expert, projection)
        with Naming(module):
            result[module] = nvfp4_pack.pack(
                weight,
                scale,
                amax=amax[projection],
                block=block,
                scales=scales,
                channel_weight=channels.get(projection),
            )
    plain = plain_expert(source, expert, stored, buffers)
    for projection in stored:
        module = names.expert(layer, expert, projection)
        _note(stats, module, projection, getattr(plain, projection), result[module])
        if scales != "max":
            by_maxima = _note_max(stats, projection, getattr(plain, projection), amax[projection])
            if projection in channels:
                errors = (
                    weighted_error(getattr(plain, projection), packed, channels[projection])
                    for packed in (result[module], by_maxima)
                )
                (signal, noise), (_, noise_of_max) = errors
                stats.weighted.setdefault(projection, []).append([signal, noise, noise_of_max])
    return result, plain


def plain_expert(
    source: Source, expert: int, stored: dict[str, Stored], buffers: dict[str, torch.Tensor]
) -> ExpertWeights:
    """One expert in BF16: in `buffers`, or as it is stored."""
    block = source.config.weight_block_size or fp8_dequant.BLOCK
    return ExpertWeights(
        expert,
        **{
            projection: weight
            if scale is None
            else fp8_dequant.dequantize(weight, scale, block=block, out=buffers[projection])
            for projection, (weight, scale) in stored.items()
        },
    )


def write_expert(shards: ShardSet, packed: Packed) -> None:
    """Write the packed weights and scales of an expert's modules."""
    for module, tensors in packed.items():
        for name, tensor in tensors._asdict().items():
            shards.write(f"{module}.{name}", tensor)


def _note(
    stats: PackStats, module: str, projection: str, weight: torch.Tensor, packed: nvfp4_pack.PackedNVFP4
) -> None:
    """Compare the BF16 `weight` with what became of it."""
    error = nvfp4_pack.squared_error(weight, None, packed)
    counts = nvfp4_pack.count_groups(weight, None, packed.weight_scale_2)
    stats.sqnr_db[projection].append(_decibels(error))
    stats.weight_scale_2[projection].append(float(packed.weight_scale_2))
    stats.zero_groups += counts.zero
    stats.saturated_groups += counts.saturated
    stats.tiny_groups += counts.tiny
    if not error.signal:
        stats.dead.append(module)


def _note_max(
    stats: PackStats, projection: str, weight: torch.Tensor, amax: torch.Tensor
) -> nvfp4_pack.PackedNVFP4:
    """What block scales from maxima would have given, beside what was gained over them; returns it."""
    packed = nvfp4_pack.pack(weight, amax=amax)
    error = nvfp4_pack.squared_error(weight, None, packed)
    stats.max_sqnr_db.setdefault(projection, []).append(_decibels(error))
    return packed


def block_scales(method: Method) -> nvfp4_pack.Scales:
    """How the algorithm of a recipe chooses block scales, but for the weights of errors."""
    return "max" if method == "max" else "mse"


def relative_errors(stats: PackStats) -> dict[str, dict[str, float]]:
    """Of each projection the layer's weighted noise over its weighted signal, as packed and under maxima."""
    found = {}
    for projection, experts in stats.weighted.items():
        signal, noise, noise_of_max = (math.fsum(column) for column in zip(*experts, strict=True))
        if signal:
            found[projection] = {"awmse": _rounded(noise / signal), "max": _rounded(noise_of_max / signal)}
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _decibels(error: nvfp4_pack.SquaredError) -> float | None:
    value = error.sqnr_db if error.signal else None
    return None if value is None or math.isinf(value) else round(value, 3)


class Naming:
    """Adds a tensor's name to what a kernel says of its content."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, fault: BaseException | None, trace: object) -> None:
        if isinstance(fault, CheckpointError):
            raise CheckpointError(
                f"tensor '{self._module}.weight': {fault.message}",
                hint="the source is damaged; download the shard again",
            ) from None
