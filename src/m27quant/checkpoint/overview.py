"""What a checkpoint is, from its configs and headers alone: sizes, formats by family, KV cache, producer, shards."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.checkpoint.header import TensorInfo
from m27quant.checkpoint.hub import locate
from m27quant.checkpoint.source import Source
from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import escape

FAMILIES = {
    "experts": re.compile(r"\.experts\.\d"),
    "router": re.compile(r"\.gate\.weight$|e_score_correction_bias$"),
    "KV scales": re.compile(r"\.[kv]_scale$"),
    "norms": re.compile(r"norm\.weight$"),
    "attention": re.compile(r"\.self_attn\."),
    "embedding": re.compile(r"^model\.embed_tokens\."),
    "head": re.compile(r"^lm_head\."),
    "other": re.compile(""),
}
"""Kinds of tensors; a name belongs to the first whose pattern it has."""

SCALES = ("_scale", "_scale_inv", "_scale_2")
_LAYER = re.compile(r"^model\.layers\.(\d{1,6})\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """All tensors of one kind: their format, and what they take."""

    name: str
    format: str
    tensors: int
    parameters: int
    """Weights, not scales; a packed byte is two."""
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of weights."""

    file: str
    tensors: int
    bytes: int
    """Of the file, header included."""
    layers: str
    """Decoder layers that have tensors in it: "0-3, 7"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """A checkpoint at a glance."""

    checkpoint: str
    architecture: M2Config
    format: str
    """Of the experts, which are nearly all of it: NVFP4, FP8 in blocks, BF16."""
    kv_cache: str
    producer: str
    excluded: int
    """Entries of the exclude list."""
    tensors: int
    parameters: int
    active_parameters: int
    """Used for one token: the routed experts and everything that is no expert."""
    bytes: int
    families: tuple[Family, ...]
    shards: tuple[Shard, ...]
    warnings: tuple[str, ...]


class AnyCheckpoint(Source):
    """A MiniMax-M2.x checkpoint in whatever way its weights are stored."""

    def _read_config(self) -> tuple[M2Config, dict[str, Any]]:
        path = self.folder / "config.json"
        raw = read_object(path)
        plain = {key: value for key, value in raw.items() if key != "quantization_config"}
        return parse_config(plain, escape(path)), raw


def inspect_checkpoint(checkpoint: str | Path, *, revision: str | None = None) -> Overview:
    """Describe the checkpoint in the local folder `checkpoint`; reads headers, no weights.

    A Hub id is looked up in this machine's cache: nobody wants 134 GB fetched for a glance.

    Raises:
        CheckpointError: no MiniMax-M2.x checkpoint, or one whose configs, index or headers cannot be read.
        UsageError, EnvironmentFault: as `locate` does.
    """
    location = locate(str(checkpoint), revision=revision, offline=True)
    with AnyCheckpoint(location) as source:
        families = _families(source.tensors)
        quantization = _section(source.raw_config.get("quantization_config"))
        beside = _optional(source.folder / "hf_quant_config.json")
        parameters = sum(f.parameters for f in families)
        c, experts = source.config, next((f for f in families if f.name == "experts"), None)
        idle = experts.parameters * (c.num_local_experts - c.num_experts_per_tok) if experts else 0
        return Overview(
            checkpoint=str(location.folder) if location.repo_id is None else location.describe(),
            architecture=c,
            format=experts.format if experts else "no experts",
            kv_cache=_kv_cache(source, quantization, beside),
            producer=_producer(source, quantization, beside),
            excluded=_excluded(quantization, beside),
            tensors=len(source.tensors),
            parameters=parameters,
            active_parameters=parameters - idle // c.num_local_experts,
            bytes=source.total_bytes,
            families=families,
            shards=tuple(_shards(source)),
            warnings=tuple(source.warnings),
        )


def _families(tensors: Mapping[str, TensorInfo]) -> tuple[Family, ...]:
    sizes: dict[str, Counter[str]] = {name: Counter() for name in FAMILIES}
    formats: dict[str, Counter[str]] = {name: Counter() for name in FAMILIES}
    for name, info in tensors.items():
        family = next(kind for kind, pattern in FAMILIES.items() if pattern.search(name))
        size = sizes[family]
        size["tensors"] += 1
        size["bytes"] += info.nbytes
        is_weight = not name.endswith(SCALES)
        if is_weight or family == "KV scales":
            kind = _format(info, tensors)
            formats[family][kind] += 1
            size["parameters"] += math.prod(info.shape) * is_weight * (2 if kind == "NVFP4" else 1)
    return tuple(
        Family(
            name=name,
            format=", ".join(kind for kind, _ in formats[name].most_common()),
            tensors=size["tensors"],
            parameters=size["parameters"],
            bytes=size["bytes"],
        )
        for name, size in sizes.items()
        if size["tensors"]
    )


def _format(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str:
    """How a weight is stored, told by its type and by the scales beside it."""
    if info.dtype == "U8" and f"{info.name}_scale_2" in tensors:
        return "NVFP4"
    if info.dtype == "F8_E4M3" and f"{info.name}_scale_inv" in tensors:
        return "FP8 in blocks"
    if info.dtype == "F8_E4M3" and f"{info.name}_scale" in tensors:
        return "FP8"
    return info.dtype


def _kv_cache(source: Source, quantization: Mapping[str, Any], beside: Mapping[str, Any]) -> str:
    """What config.json asks engines for, or hf_quant_config.json where it is silent."""
    scheme = _section(quantization.get("kv_cache_scheme"))
    algorithm = _section(beside.get("quantization")).get("kv_cache_quant_algo")
    if scheme:
        kind = f"{escape(scheme.get('type'))} with {escape(scheme.get('num_bits'))} bits"
    else:
        kind = escape(algorithm) if algorithm else "BF16"
    kind = "FP8" if kind == "float with 8 bits" else kind
    count = sum(FAMILIES["KV scales"].search(name) is not None for name in source.tensors)
    if kind == "BF16" and not count:
        return kind
    return f"{kind}, {count:,} scale tensors" if count else f"{kind}, no scale tensors"


def _producer(source: Source, quantization: Mapping[str, Any], beside: Mapping[str, Any]) -> str:
    """Who quantized it: the report beside it knows better than the name that engines ask for."""
    report = _optional(source.folder / "quantization_report.json")
    for section in (report, beside, quantization):
        producer = _section(section.get("producer"))
        if producer:
            method = quantization.get("quant_algo") or quantization.get("quant_method") or "unknown"
            return f"{escape(producer.get('name'))} {escape(producer.get('version'))} ({escape(method)})"
    method = quantization.get("quant_method")
    return f"not named ({escape(method)})" if method else "not quantized"


def _excluded(quantization: Mapping[str, Any], beside: Mapping[str, Any]) -> int:
    nested = _section(beside.get("quantization"))
    for entries in (
        quantization.get("ignore"),
        quantization.get("exclude_modules"),
        nested.get("exclude_modules"),
        quantization.get("modules_to_not_convert"),
    ):
        if isinstance(entries, list):
            return len(entries)
    return 0


def _shards(source: Source) -> Iterable[Shard]:
    for path, header in source.headers.items():
        layers = {int(m[1]) for name in header.tensors if (m := _LAYER.match(name))}
        yield Shard(
            file=path.name,
            tensors=len(header.tensors),
            bytes=header.file_size,
            layers=_ranges(sorted(layers)),
        )


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers as people write them: "0-3, 7"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ", ".join("-".join(str(n) for n in run) for run in runs)


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _section(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
