"""What a quantization will do, decided before anything long starts: formats, files to the byte, memory, disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from m27quant.checkpoint import names
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.durable import raise_for_os_error
from m27quant.checkpoint.names import TensorSpec
from m27quant.checkpoint.quant_config import exclude_modules
from m27quant.checkpoint.source import Source
from m27quant.checkpoint.writer import ShardPlan, split_into_shards
from m27quant.errors import EnvironmentFault, OutputError, RecipeError, UsageError, escape
from m27quant.recipes import Recipe, ResolvedRecipe

EMBED, HEAD = "embed", "head"
DISK_SLACK = 64 * 2**20
"""Journal, report, tokenizer, file system overhead."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of durable work: the embedding, one decoder layer, or norm and head."""

    name: str
    layer: int | None
    shards: tuple[ShardPlan, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole output, in the order in which it is made."""

    resolved: ResolvedRecipe
    exclude: list[str]
    units: tuple[Unit, ...]

    @property
    def num_tensors(self) -> int:
        return sum(len(s.offsets) for u in self.units for s in u.shards)

    @property
    def tensor_bytes(self) -> int:
        """The index's total_size: bytes of all tensors, without headers."""
        return sum(s.tensor_bytes for u in self.units for s in u.shards)

    @property
    def shard_bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(s.size for u in self.units for s in u.shards)

    def shard_names(self) -> list[str]:
        """Final file names in order."""
        count = sum(len(u.shards) for u in self.units)
        return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def make_plan(source: Source, recipe: Recipe, max_shard_bytes: int) -> Plan:
    """Resolve the recipe against the model and lay out every output tensor.

    Raises:
        RecipeError: a pattern that matches nothing, or asks for what cannot be written.
    """
    config = source.config
    resolved = recipe.resolve(names.linear_modules(config))
    if not resolved.quantized:
        raise RecipeError(f"recipe '{escape(recipe.name)}' quantizes nothing in this model")
    units = [
        _unit(EMBED, None, [_copied(source, names.EMBEDDING)], max_shard_bytes),
        *(
            _unit(f"layer-{i:04d}", i, list(layer_specs(source, resolved, i)), max_shard_bytes)
            for i in range(config.num_hidden_layers)
        ),
        _unit(
            HEAD, None, [_copied(source, names.FINAL_NORM), _copied(source, names.LM_HEAD)], max_shard_bytes
        ),
    ]
    return Plan(resolved, exclude_modules(resolved.quantized, resolved.unquantized), tuple(units))


def _unit(name: str, layer: int | None, specs: list[TensorSpec], max_shard_bytes: int) -> Unit:
    return Unit(name, layer, tuple(split_into_shards(specs, max_shard_bytes)))


def layer_specs(source: Source, resolved: ResolvedRecipe, layer: int) -> Iterator[TensorSpec]:
    """Output tensors of one decoder layer: attention in BF16, router and norms as they are, experts in NVFP4."""
    config = source.config
    yield from (_copied(source, name) for name in norm_and_router_names(config, layer))
    for projection, shape in names.attention_shapes(config).items():
        yield TensorSpec(f"{names.attention(layer)}.{projection}.weight", "BF16", shape)
    if resolved.kv_cache == "fp8":
        yield TensorSpec(names.k_scale(layer), "F32", ())
        yield TensorSpec(names.v_scale(layer), "F32", ())
    for expert in range(config.num_local_experts):
        for projection, shape in names.expert_shapes(config).items():
            yield from names.nvfp4_specs(names.expert(layer, expert, projection), shape)


def norm_and_router_names(config: M2Config, layer: int) -> list[str]:
    """Tensors of a layer that keep their source bytes."""
    return [*names.norm_shapes(config, layer), names.gate(layer), names.correction_bias(layer)]


def _copied(source: Source, name: str) -> TensorSpec:
    info = source.info(name)
    return TensorSpec(name, info.dtype, info.shape)


def disk_needed(plan: Plan, hidden_bytes: int, *, rows_in_memory: bool, sums: int = 0) -> int:
    """Most bytes that a fresh run has on disk at once: all shards, two hidden states, scratch where rows spill.

    `sums` are those of statistics that ranks add up through a file.
    """
    scratch = 0 if rows_in_memory else 2 * hidden_bytes
    return plan.shard_bytes + 2 * hidden_bytes + scratch + sums + DISK_SLACK


def check_disk(out: Path, needed: int) -> None:
    """Raise `EnvironmentFault` where the file system of `out` has fewer than `needed` bytes free."""
    folder = _existing_parent(out)
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if free < needed:
        raise EnvironmentFault(
            f"{escape(folder)}: {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} GiB needed",
            hint="free some space, or choose OUT on another file system",
        )
    if stats.f_files and not stats.f_favail:
        raise EnvironmentFault(
            f"{escape(folder)}: the file system has no inodes left",
            hint="delete some files, or choose another OUT",
        )


def check_paths(source: Path, out: Path) -> None:
    """Refuse an OUT that is MODEL, inside it, or around it, through whatever links.

    Raises:
        UsageError: they touch.
        EnvironmentFault: OUT's parent cannot be written to.
    """
    try:
        model, target = source.resolve(), out.resolve()
        folder = _existing_parent(out)
        same = out.exists() and source.exists() and out.samefile(source)
    except OSError as fault:
        raise_for_os_error(fault, out)
    except RuntimeError:  # how Python 3.11 and 3.12 say that links go in circles
        raise OutputError(
            f"{escape(out)}: a link that cannot be followed", hint="choose another OUT"
        ) from None
    if same or model == target or model in target.parents or target in model.parents:
        raise UsageError(
            f"OUT {escape(out)} and MODEL {escape(source)} must be two folders, neither inside the other",
            hint="choose another OUT",
        )
    if (folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK)) or _read_only(folder):
        raise EnvironmentFault(
            f"{escape(folder)}: not writable", hint="choose another OUT, or change its permissions"
        )


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
