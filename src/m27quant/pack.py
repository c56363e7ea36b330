"""One expert at a time from the source: FP8 bytes in, NVFP4 tensors to the shard, BF16 weights to calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from m27quant.calib.layerwise import ExpertWeights
from m27quant.checkpoint import names
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.source import Source
from m27quant.checkpoint.writer import ShardSet
from m27quant.errors import CheckpointError
from m27quant.kernels import fp8_dequant, nvfp4_pack
from m27quant.pack_stats import PackStats
from m27quant.packing import ByMaxima, Linear, Packing
from m27quant.runtime.loader import read_linear

Stored = tuple[torch.Tensor, torch.Tensor | None]
"""A linear as it is stored: weight [N, K] in FP8 or BF16, and its block scales."""
Packed = dict[str, nvfp4_pack.PackedNVFP4]
"""The linears of an expert by module name."""


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
    how: Packing = ByMaxima(),  # noqa: B008 - it holds nothing
    through: Sequence[int] | None = None,
) -> Iterator[Sequence[ExpertWeights]]:
    """Pack and write every expert that is this rank's; yields the BF16 weights of all, `group` experts at a time.

    `through` names the experts to read, in their order; all where None.

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
                    how,
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
    how: Packing,
) -> tuple[Packed, ExpertWeights]:
    """One expert in NVFP4, w1 and w3 with one `weight_scale_2`, and in BF16: in `buffers`, or as it is stored."""
    block = source.config.weight_block_size or fp8_dequant.BLOCK
    amax = {}
    for projection, (weight, scale) in stored.items():
        with Naming(names.expert(layer, expert, projection)):
            amax[projection] = nvfp4_pack.amax(weight, scale, block=block)
    amax["w1"] = amax["w3"] = torch.maximum(amax["w1"], amax["w3"])
    linears = {
        names.expert(layer, expert, p): Linear(expert, p, weight, scale, block, amax[p])
        for p, (weight, scale) in stored.items()
    }
    result: Packed = {}
    for module, linear in linears.items():
        with Naming(module):
            result[module] = how.pack(linear)
    plain = plain_expert(source, expert, stored, buffers)
    for module, linear in linears.items():
        values = getattr(plain, linear.projection)
        stats.add(module, linear.projection, values, result[module])
        how.note(linear, values, result[module], stats)
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
