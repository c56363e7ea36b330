"""Figures of a run, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from m27quant.cli.output import pairs
from m27quant.cli.units import format_duration, format_size

if TYPE_CHECKING:
    from m27quant.runtime.api import LLM, GenerateResult
    from m27quant.runtime.lossless import Comparison


def stats_table(llm: LLM, result: GenerateResult, comparison: Comparison | None = None) -> RenderableType:
    """What one answer took."""
    s, a = result.stats, result.stats.acceptance
    facts = {
        "tokens": f"{result.num_prompt_tokens} in the prompt"
        + (f", {s.num_reused_tokens} of them from the cache" if s.num_reused_tokens else "")
        + f", {len(result.token_ids)} in the answer ({result.finish_reason})",
        "time": f"{_seconds(s.total_s)}; first token after {_seconds(s.time_to_first_token_s)}",
        "speed": _rate(s.tokens_per_s) + " behind the first token",
    }
    if llm.engine.drafter is not None and a.num_steps:
        facts |= {
            "tau": f"{a.tau:.2f} tokens a step, {a.m_accept:.2f} of them drafts accepted (m_accept)",
            "C_k": _shares(a.c_k),
            "conditional": _shares(a.conditional),
            "drafts": f"{a.drafts_per_step:.1f} a step, {a.num_accepted} of {a.num_drafted} accepted, "
            f"{a.num_steps} steps",
            "draft and verify": f"{_seconds(s.draft_s)} drafting, {_seconds(s.verify_s)} in the target",
        }
    if comparison is not None:
        facts["with and without drafter"] = (
            f"{_rate(comparison.tokens_per_s)} and {_rate(comparison.plain_tokens_per_s)}: "
            f"{comparison.speedup:.2f} times; {comparison_line(comparison)}"
        )
    m = llm.memory
    drafter = f"drafter {format_size(m.drafter_bytes)}, " if m.drafter_bytes else ""
    facts["memory"] = (
        f"weights {format_size(m.weight_bytes)}, {drafter}KV cache {format_size(m.cache_bytes)} "
        f"({m.num_blocks * m.block_size:,} tokens)"
    )
    return pairs(facts)


def stats_document(result: GenerateResult) -> dict[str, Any]:
    """The same as numbers, seconds and tokens per second."""
    found = result.stats.to_json()
    return {**found.pop("acceptance"), **found}


def memory_document(llm: LLM) -> dict[str, Any]:
    """Bytes of weights, drafter and cache."""
    m = llm.memory
    return {
        "device": str(m.device),
        "weight_bytes": m.weight_bytes,
        "drafter_bytes": m.drafter_bytes,
        "kv_cache_bytes": m.cache_bytes,
        "kv_cache_tokens": m.num_blocks * m.block_size,
        "step_bytes": m.step_bytes,
    }


def comparison_document(comparison: Comparison, *, checked: bool) -> dict[str, Any]:
    """With and without the drafter."""
    return {
        "checked": checked,
        "is_lossless": comparison.is_lossless,
        "first_difference": comparison.first,
        "tokens_per_s": comparison.tokens_per_s,
        "tokens_per_s_without_drafter": comparison.plain_tokens_per_s,
        "speedup": comparison.speedup,
    }


def comparison_line(comparison: Comparison) -> str:
    """Whether the answers are the same, in one line."""
    first = comparison.first
    if first is None:
        return "the same tokens with the drafter and without it"
    margin = (
        "" if first.margin is None else f"; the two likeliest tokens there are {first.margin:.3g} nats apart"
    )
    return (
        f"token {first.position} is {_token(first.token)} with the drafter and "
        f"{_token(first.plain_token)} without it{margin}"
    )


def _token(token: int | None) -> str:
    return "missing" if token is None else str(token)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    return f"{seconds:.3g} s" if seconds < 60 else format_duration(seconds)


def _rate(rate: float | None) -> str:
    return "no" if rate is None else f"{rate:.1f} tokens/s"


def _shares(shares: list[float]) -> str:
    return " ".join(f"{share:.1%}" for share in shares) or "none accepted"
