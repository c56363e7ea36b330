"""From a checked checkpoint to a model that answers: form, memory, weights, drafter, cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from m27quant.checkpoint.source import Source
from m27quant.runtime.api import LLM
from m27quant.runtime.device import pick_device
from m27quant.runtime.kv_cache import CacheShape, KvCache
from m27quant.runtime.memory import Budget, MemoryPlan, step_bytes
from m27quant.runtime.model import Model
from m27quant.runtime.options import RunOptions
from m27quant.runtime.parallel import ALONE, join, local_device
from m27quant.runtime.speculative.proposal import Drafter
from m27quant.runtime.weights import choose_form, load_model, weight_bytes

MakeDrafter = Callable[[Model], Drafter]
"""The drafter for a loaded target, whose embeddings and head it may share."""


def load_llm(
    source: Source,
    options: RunOptions,
    *,
    make_drafter: MakeDrafter | None = None,
    alone: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LLM:
    """Load a checkpoint whose layout has been checked.

    Args:
        source: the checkpoint; may be closed afterwards.
        options: how to run it.
        make_drafter: makes the drafter; none where None.
        alone: this process holds the whole model, whatever ranks there are.
        say: takes one line about each thing that was decided.
        progress: called with layers loaded and layers in all.

    Raises:
        CheckpointError: a weight or a configuration that cannot be computed with, named.
        EnvironmentFault: no such device, or it does not fit.
        UsageError: options that do not go with the checkpoint.
    """
    device = pick_device(local_device(options.device))
    ranks = ALONE if alone else join(device)
    ranks.check(source.config)
    form = choose_form(
        source,
        activations=options.activations,
        kv_cache_dtype=options.kv_cache_dtype,
        dtype=getattr(torch, options.dtype),
        device=device,
    )
    config = source.config
    longest = min(config.max_position_embeddings, options.max_model_len or config.max_position_embeddings)
    budget = Budget.of(device, options.max_memory)
    needed = weight_bytes(source, form, longest, ranks)

    def plan(
        taps: int, drafts: int, drafter_bytes: int, drafter_token_bytes: int
    ) -> tuple[CacheShape, MemoryPlan]:
        shape = CacheShape(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads // ranks.size,
            head_dim=config.head_dim,
            dtype=form.kv_dtype,
            block_size=options.block_size,
            num_taps=taps,
            hidden_size=config.hidden_size,
            taps_dtype=form.dtype,
            drafter_token_bytes=drafter_token_bytes,
        )
        logits = options.max_num_seqs * (1 + drafts)
        return shape, budget.plan(
            shape,
            weight_bytes=needed,
            drafter_bytes=drafter_bytes,
            step_bytes=step_bytes(
                config, num_tokens=options.max_num_batched_tokens, num_logits=logits, dtype=form.dtype
            ),
            most_blocks=options.max_num_seqs * -(-longest // options.block_size),
            cache_bytes=options.kv_cache_memory,
        )

    plan(0, 0, 0, 0)  # refused before anything is read
    model = load_model(
        source,
        form,
        max_length=longest,
        invariant=_is_invariant(options, device),
        ranks=ranks,
        progress=progress,
    )
    drafting = make_drafter(model) if make_drafter else None
    taps, drafts = (len(drafting.taps), drafting.num_draft_tokens) if drafting else (0, 0)
    context = getattr(drafting, "context", None)  # prompt lookup and a program's own drafters have none
    shape, memory = plan(
        taps, drafts, getattr(drafting, "nbytes", 0), context.bytes_per_token if context is not None else 0
    )
    cache = KvCache(shape, ranks.smallest(memory.num_blocks, device), device)
    taken = replace(options, activations=form.activations)
    llm = LLM(model, cache, source.folder, taken, memory, drafting, notices=form.notices)
    for line in (*llm.notices, form.describe(), memory.describe()):
        say(line)
    return llm


def _is_invariant(options: RunOptions, device: torch.device) -> bool:
    return device.type == "cpu" if options.invariant is None else options.invariant
