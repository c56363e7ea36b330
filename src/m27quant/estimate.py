"""What `--dry-run` tells: sizes to the byte, memory, disk, and time from a short measurement on the real weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from m27quant.calib.gram import Gram
from m27quant.calib.layer_ranges import amax_tensor
from m27quant.calib.moments import ChannelWeights, squares
from m27quant.checkpoint import names
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.writer import open_shards, plan_shard
from m27quant.distributed.ranks import Ranks
from m27quant.kernels import fp8_dequant
from m27quant.kernels.nvfp4_gptq import Factor, factorize
from m27quant.layer_statistics import statistics_on_disk
from m27quant.pack import Stored, bf16_buffers, pack_expert, read_expert, write_expert
from m27quant.pack_stats import PackStats
from m27quant.packing import ByErrorFeedback, ByLeastError, Packing, plain_packing
from m27quant.plan import disk_needed
from m27quant.prepare import Options, Prepared, prepare
from m27quant.quantize import log
from m27quant.recipes.algorithm import FULL_COVERAGE_METHODS, Method
from m27quant.runtime.layer import gated_activation
from m27quant.shares import share_of


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """The plan of a quantization; nothing was written."""

    source: str
    recipe: str
    quantized: dict[str, int]
    """Kind of module -> how many become NVFP4."""
    left_alone: dict[str, int]
    """Kind of module -> how many keep their precision."""
    kv_cache: str | None
    exclude_modules: list[str]
    num_tensors: int
    source_bytes: int
    output_tensor_bytes: int
    output_shard_bytes: int
    """Sum of the shard files' sizes, exactly."""
    num_shards: int
    peak_memory_bytes: int
    peak_device_bytes: int
    rows_in_memory: bool
    peak_disk_bytes: int
    num_samples: int
    num_tokens: int
    device: str
    ranks: int
    """Processes that share the work; memory is that of the one with most to do."""
    tokens_per_rank: list[int]
    experts_per_rank: list[int]
    """Of each layer; a rank packs and writes these."""
    estimated_seconds: float
    notices: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dry_run(
    model: str,
    out: str | Path,
    options: Options | None = None,
    *,
    ranks: int = 1,
    say: Callable[[str], None] = log.info,
    **changes: Any,
) -> DryRun:
    """Check everything that `quantize_checkpoint` would check and say what it would do on `ranks` processes.

    Raises:
        M27Error: as `quantize_checkpoint` would before its work begins.
    """
    options = replace(options or Options(), **changes)
    prepared = prepare(model, Path(out), options, say, fetch=False)
    with prepared.source as source:
        plan = prepared.plan
        each = [Ranks(rank, ranks, local_size=ranks) for rank in range(ranks)]
        shares = [share_of(prepared, options, r, prepared.memory.chunk_tokens) for r in each]
        tokens = [sum(map(len, chunks)) for chunks, _ in shares]
        memory = max((memory for _, memory in shares), key=lambda m: (m.peak_bytes, m.device_peak_bytes))
        experts = range(source.config.num_local_experts)
        return DryRun(
            source=source.location.describe(),
            recipe=prepared.recipe.name,
            quantized=_kinds(plan.resolved.quantized),
            left_alone=_kinds(plan.resolved.unquantized),
            kv_cache=plan.resolved.kv_cache,
            exclude_modules=plan.exclude,
            num_tensors=plan.num_tensors,
            source_bytes=source.total_bytes,
            output_tensor_bytes=plan.tensor_bytes,
            output_shard_bytes=plan.shard_bytes,
            num_shards=len(plan.shard_names()),
            peak_memory_bytes=memory.peak_bytes,
            peak_device_bytes=memory.device_peak_bytes,
            rows_in_memory=memory.rows_in_memory,
            peak_disk_bytes=disk_needed(
                plan,
                prepared.hidden_bytes,
                rows_in_memory=memory.rows_in_memory,
                sums=statistics_on_disk(plan.resolved.algorithm, options.input_range, source.config, ranks),
            ),
            num_samples=len(prepared.sequences.lengths),
            num_tokens=prepared.sequences.num_tokens,
            device=str(prepared.device),
            ranks=ranks,
            tokens_per_rank=tokens,
            experts_per_rank=[sum(map(r.owns, experts)) for r in each],
            estimated_seconds=round(estimate_seconds(prepared, max(tokens)), 1),
            notices=prepared.notices,
        )


def _kinds(modules: tuple[str, ...]) -> dict[str, int]:
    """Count modules by their last name: {"w1": 15872, ...}."""
    kinds: dict[str, int] = {}
    for module in modules:
        kind = module.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + 1
    return dict(sorted(kinds.items()))


def estimate_seconds(prepared: Prepared, num_tokens: int) -> float:
    """Time of the whole run: one real expert is read, packed and run on one chunk, and scaled up.

    Several ranks are as slow as the one with most tokens, `num_tokens`; each reads all experts.
    """
    c = prepared.source.config
    with torch.inference_mode():
        expert_s, stored = _time_expert(prepared)
        tokens = min(prepared.memory.chunk_tokens, prepared.sequences.num_tokens)
        act_s = _time_activation(prepared, stored, tokens)
    flop = 2 * 2 * c.hidden_size * c.intermediate_size * tokens
    rate = flop / act_s
    dense = (
        2 * c.hidden_size * (2 * c.q_size + 2 * c.kv_size)
        + 6 * c.hidden_size * c.intermediate_size * c.num_experts_per_tok
    )
    per_layer = c.num_local_experts * (expert_s + act_s * num_tokens / tokens)
    per_layer += dense * num_tokens / rate
    return per_layer * c.num_hidden_layers


def _time_expert(prepared: Prepared) -> tuple[float, dict[str, Stored]]:
    """Seconds to read (twice, where packing comes later), pack and write one expert; of two the second, warm one."""
    source = prepared.source
    method = prepared.plan.resolved.algorithm
    how = _packing(method, source.config, prepared.device)
    seconds = 0.0
    buffers = bf16_buffers(source.config, prepared.device)
    last = source.config.num_local_experts - 1
    stored: dict[str, Stored] = {}
    with TemporaryDirectory(prefix="m27quant-") as folder:
        for expert in dict.fromkeys((0, last)):
            specs = [
                spec
                for projection, shape in names.expert_shapes(source.config).items()
                for spec in names.nvfp4_specs(names.expert(0, expert, projection), shape)
            ]
            started = time.perf_counter()
            with open_shards(Path(folder), f"expert-{expert}", [plan_shard(specs)], []) as shards:
                for _ in range(2 if method in FULL_COVERAGE_METHODS else 1):
                    stored = read_expert(source, 0, expert, prepared.device)
                packed, _ = pack_expert(source, 0, expert, stored, PackStats(), buffers, how)
                write_expert(shards, packed)
                for projection in names.EXPERT_PROJECTIONS:
                    shards.write(f"{names.expert(0, expert, projection)}.input_scale", torch.tensor(1.0))
            seconds = time.perf_counter() - started
    return seconds, stored


def _packing(method: Method, config: M2Config, device: torch.device) -> Packing:
    """As the recipe packs, by statistics that take as long as real ones."""
    experts, channels = config.num_local_experts, (config.hidden_size, config.intermediate_size)
    if method == "awmse":
        return ByLeastError(ChannelWeights(*(torch.ones(experts, count) for count in channels)))
    return ByErrorFeedback(_PlainHessians(*channels, device)) if method == "gptq" else plain_packing(method)


class _PlainHessians:
    """Inputs whose channels have nothing in common; w2's is factorized for each expert."""

    def __init__(self, inputs: int, activations: int, device: torch.device) -> None:
        self._inputs = factorize(torch.eye(inputs, dtype=torch.float64, device=device))
        self._activations = torch.eye(activations, dtype=torch.float64, device=device)
        self._last: tuple[int, Factor] | None = None

    def factor(self, expert: int, projection: str) -> Factor:
        if projection != "w2":
            return self._inputs
        if self._last is None or self._last[0] != expert:
            self._last = expert, factorize(self._activations)
        return self._last[1]


def _time_activation(prepared: Prepared, stored: dict[str, Stored], tokens: int) -> float:
    """Seconds for one expert's w1 and w3 over `tokens` tokens, and for what the recipe wants to know of the result."""
    config, device = prepared.source.config, prepared.device
    method = prepared.plan.resolved.algorithm
    block = config.weight_block_size or fp8_dequant.BLOCK
    w1, w3 = (
        w if s is None else fp8_dequant.dequantize(w, s, block=block) for w, s in (stored["w1"], stored["w3"])
    )
    h = torch.randn(tokens, config.hidden_size, device=device).bfloat16()
    routed = tokens * config.num_experts_per_tok // config.num_local_experts
    gram = Gram(config.intermediate_size, device) if method == "gptq" else None
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        act = gated_activation(h, w1, w3)
        if method in FULL_COVERAGE_METHODS:
            squares(act)
        if gram is not None:
            gram.add(act[:routed])
        float(amax_tensor(act))
        seconds = time.perf_counter() - started
    return max(seconds, 1e-9)
