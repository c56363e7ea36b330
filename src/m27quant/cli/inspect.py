"""`m27quant inspect`: what a checkpoint is, at a glance."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from m27quant.cli import options
from m27quant.cli.output import Output, grid, pairs
from m27quant.cli.units import format_size

if TYPE_CHECKING:
    from m27quant.checkpoint.overview import Overview

MAX_SHARDS = 20
"""Rows of the table for people; JSON and -v have all."""


def inspect(
    checkpoint: options.Model,
    revision: options.Revision = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Show what a checkpoint is: architecture, formats, KV cache, producer, shards; reads no weights.

    A Hub id is looked up in this machine's cache; nothing is downloaded.

    Examples:
      m27quant inspect ./m27-nvfp4

      m27quant inspect examples/tiny-m27 --json
    """
    from m27quant.checkpoint.overview import inspect_checkpoint

    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    overview = inspect_checkpoint(checkpoint, revision=revision)
    for warning in overview.warnings:
        output.warning(warning)
    output.result(dataclasses.asdict(overview), human=_render(overview, bool(verbose)), quiet=overview.format)


def _render(overview: Overview, all_shards: bool) -> RenderableType:
    c = overview.architecture
    facts = {
        "checkpoint": overview.checkpoint,
        "experts' format": overview.format,
        "KV cache": overview.kv_cache,
        "producer": overview.producer,
        "exclude list": f"{overview.excluded:,} entries",
        "parameters": f"{overview.parameters:,}, {overview.active_parameters:,} of them for one token",
        "size": f"{format_size(overview.bytes)} ({overview.bytes:,} bytes) in {overview.tensors:,} tensors",
        "layers": c.num_hidden_layers,
        "experts": f"{c.num_local_experts} of {c.intermediate_size}, {c.num_experts_per_tok} for one token",
        "hidden size": c.hidden_size,
        "attention": f"{c.num_attention_heads} query and {c.num_key_value_heads} key/value heads of {c.head_dim}, "
        f"{c.rotary_dim} rotated",
        "vocabulary": f"{c.vocab_size:,}",
        "context": f"{c.max_position_embeddings:,}",
    }
    families = [(f.name, f.format, f.tensors, f.parameters, format_size(f.bytes)) for f in overview.families]
    shards = overview.shards if all_shards else overview.shards[:MAX_SHARDS]
    rows = [(s.file, s.tensors, format_size(s.bytes), s.layers) for s in shards]
    rest = len(overview.shards) - len(shards)
    return Group(
        pairs(facts),
        Text("\nwhat it holds", style="bold"),
        grid(("tensors", "format", "count", "parameters", "size"), families),
        Text(f"\n{len(overview.shards)} shards", style="bold"),
        grid(("file", "tensors", "size", "layers"), rows),
        *([Text(f"and {rest} more; -v shows all")] if rest else []),
    )
