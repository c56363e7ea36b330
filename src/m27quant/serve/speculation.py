"""A drafter in an engine's own terms: how many drafts, which taps, what the engine's version cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m27quant.checkpoint.drafter_config import DrafterConfig, Kind, Taps, default_taps
from m27quant.errors import FindingsError, UsageError
from m27quant.serve.engines_data import (
    DEFAULT_STEPS,
    DEFAULT_TREE_ROWS,
    DRAFT_CACHE_WHY,
    MAX_DRAFT_TOKENS,
    V2_RUNNER,
    V2_RUNNER_WHY,
    EngineVersion,
)
from m27quant.serve.memory_fit import DrafterSize


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was asked of drafting; None is chosen."""

    num_draft_tokens: int | None = None
    num_steps: int | None = None
    eagle_topk: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """What is passed to the engine."""

    kind: Kind
    model: str
    """Path or Hub id."""
    revision: str | None
    steps: int
    """Drafts of a chain or block; depth of a tree."""
    topk: int
    rows: int
    """Rows that the target verifies, the anchor or root included."""
    bf16_cache: bool
    """The drafter's cache has 16 bits where the target's has 8."""
    environment: Mapping[str, str]
    reasons: Mapping[str, str]
    """Of the environment's variables."""
    notes: tuple[str, ...]
    detail: str


def plan_drafts(
    c: DrafterConfig,
    taps: Taps | None,
    wish: Wish,
    *,
    engine: EngineVersion,
    layers: int,
    fp8_cache: bool,
    model: str,
    revision: str | None,
) -> Speculation:
    """Decide how `engine` is to run a drafter of a target of `layers` layers.

    Raises:
        FindingsError: this version cannot run it; says what can.
        UsageError: wishes that do not go with the drafter or the engine.
    """
    if engine.name == "sglang" and c.kind == "dflash":
        raise FindingsError(
            f"M27-R029: {engine.shown} refuses DFlash for MiniMax-M2: the model has no set_dflash_layers_to_capture",
            hint="serve it with --engine vllm or builtin, or give SGLang an EAGLE3 drafter",
        )
    steps, topk, rows = _sizes(c, wish)
    if engine.name == "vllm" and topk > 1:
        raise UsageError(
            f"{engine.shown} drafts chains, never trees: --eagle-topk {topk} is not possible there",
            hint="leave --eagle-topk out, or take --engine sglang or builtin",
        )
    environment: dict[str, str] = {}
    notes: list[str] = []
    if engine.name == "vllm" and c.kind == "eagle3" and _only_nested(c):
        if taps is None or taps.captured == default_taps(layers):
            environment[V2_RUNNER[0]] = V2_RUNNER[1]
        else:
            notes.append(
                f"{engine.shown} will take hidden states {list(default_taps(layers))} for this drafter's "
                f"{list(taps.captured)}, and little will be accepted; add eagle_aux_hidden_state_layer_ids "
                f"{list(taps.captured)} at the top level of its config.json"
            )
    if engine.name == "sglang":
        notes.append(
            f"{engine.shown} answers at most 48 requests at a time with a drafter unless --max-num-seqs says more"
        )
    shown = "the engine's own" if taps is None else f"hidden states {', '.join(map(str, taps.captured))}"
    bf16_cache = engine.name == "vllm" and c.kind == "dflash" and fp8_cache
    return Speculation(
        kind=c.kind, model=model, revision=revision, steps=steps, topk=topk, rows=rows, bf16_cache=bf16_cache,
        environment=environment, reasons=dict.fromkeys(environment, V2_RUNNER_WHY), notes=tuple(notes),
        detail=f"{steps} drafts a step, taps are {shown}"
        + (f"; {DRAFT_CACHE_WHY}" if bf16_cache else ""),
    )  # fmt: skip


def drafter_size(c: DrafterConfig, weight_bytes: int, tp: int, *, fp8_cache: bool) -> DrafterSize:
    """What it takes of every GPU: all of its weights, and its share of key/value heads."""
    heads = -(-c.num_key_value_heads // tp)
    return DrafterSize(
        weights=weight_bytes,
        cache_per_token=c.num_hidden_layers * 2 * heads * c.head_dim * (1 if fp8_cache else 2),
    )


def _sizes(c: DrafterConfig, wish: Wish) -> tuple[int, int, int]:
    """Drafts, branches, and rows that are verified."""
    topk = wish.eagle_topk or 1
    if c.kind == "dflash":
        for value, option in ((wish.num_steps, "--num-steps"), (wish.eagle_topk, "--eagle-topk")):
            if value is not None:
                raise UsageError(f"{option} is for EAGLE3; a DFlash drafter drafts one block")
        block = _block_size(c)
        drafts = wish.num_draft_tokens or block - 1
        if drafts > block - 1:
            raise UsageError(f"--num-draft-tokens {drafts}: a block of {block} drafts {block - 1} at most")
        return drafts, 1, drafts + 1
    if topk == 1:
        if None not in (wish.num_steps, wish.num_draft_tokens) and wish.num_steps != wish.num_draft_tokens:
            raise UsageError("--num-steps and --num-draft-tokens differ, and a chain has one length")
        steps = wish.num_steps or wish.num_draft_tokens or DEFAULT_STEPS
        if steps > MAX_DRAFT_TOKENS:
            raise UsageError(f"{steps} drafts a step are more than {MAX_DRAFT_TOKENS}")
        return steps, 1, steps + 1
    steps, rows = wish.num_steps or DEFAULT_STEPS, wish.num_draft_tokens or DEFAULT_TREE_ROWS
    if max(steps, topk, rows) > MAX_DRAFT_TOKENS:
        raise UsageError(f"a tree is at most {MAX_DRAFT_TOKENS} deep, wide and large")
    return steps, topk, rows


def _block_size(c: DrafterConfig) -> int:
    value: Any = c.section().get("block_size", c.raw.get("block_size"))
    return value if isinstance(value, int) and value >= 2 else 2  # anything else is an error of verify's


def _only_nested(c: DrafterConfig) -> bool:
    return c.layout == "flat" and not c.raw.get("eagle_aux_hidden_state_layer_ids")
