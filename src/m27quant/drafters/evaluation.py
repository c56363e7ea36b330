"""What an evaluation is asked for, and what it found: one row for each drafter, setting, target and mode."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

from m27quant.drafters.compare import Difference
from m27quant.drafters.metrics import AcceptanceStats, total
from m27quant.drafters.proxy import Proxy
from m27quant.errors import UsageError
from m27quant.runtime.speculative.taps import TapOffset


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What is measured."""

    num_prompts: int = 64
    prompt_tokens: int = 64
    """Of pieces of text."""
    max_tokens: int = 128
    """Generated behind each prompt."""
    stride: int = 8
    """A block of the proxy begins behind every so many tokens of the text."""
    temperature: float = 0.0
    ignore_eos: bool = True
    """End tokens do not end an answer: every prompt has the same weight."""
    seed: int = 0
    num_draft_tokens: tuple[int, ...] = ()
    """DFlash: drafts a step; EAGLE3: rows of the tree.  Each is measured; the drafter's own, or 8 rows, where empty."""
    num_steps: int | None = None
    """EAGLE3: depth."""
    eagle_topk: int | None = None
    """EAGLE3: branches of the tree, 4 where None; 1 leaves it out.  A chain is measured in any case."""
    tap_offset: TapOffset | None = None
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` naming the field that cannot be."""
        for name in ("num_prompts", "prompt_tokens", "max_tokens", "stride"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any(count < 1 for count in self.num_draft_tokens):
            raise UsageError(f"num_draft_tokens must be at least 1, got {min(self.num_draft_tokens)}")


@dataclass(frozen=True, slots=True)
class TargetMode:
    """A target and how it was run."""

    name: str
    activations: str
    """Of the experts: nvfp4 (W4A4) or bf16."""
    kv_cache_dtype: str
    is_quantized: bool
    """NVFP4 weights."""

    def describe(self) -> str:
        """Weights, activations and cache in short."""
        weights = ("W4A4" if self.activations == "nvfp4" else "W4A16") if self.is_quantized else "unquantized"
        return f"{weights}, {self.kv_cache_dtype.upper()} KV"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRow:
    """One drafter in one setting on one target."""

    drafter: str
    """As it was named."""
    kind: str
    """dflash, eagle3 or ngram."""
    setting: str
    """Block, chain or tree, and its size."""
    num_drafts: int
    """Drafted tokens a step; of prompt lookup beside it too."""
    target: TargetMode
    per_prompt: tuple[AcceptanceStats, ...]
    """The steps of each prompt's answer."""
    ngram: AcceptanceStats
    """Prompt lookup on the same answers."""
    repeated_8grams: float
    """Share of the generated tokens that end an 8-gram seen before."""
    proxy: Proxy | None
    """None where nothing follows the prompts, and for prompt lookup."""
    difference: Difference | None = None
    """To the first target: of tau."""
    proxy_difference: Difference | None = None
    """To the first target: of the proxy's m_accept."""

    @property
    def generation(self) -> AcceptanceStats:
        """All steps of all answers."""
        return total(self.per_prompt)

    def to_json(self) -> dict[str, Any]:
        """tau, m_accept and c_k are of generation, val_loss and blocks of the proxy."""
        stats, proxy = self.generation, None
        if self.proxy is not None:
            proxy = {
                "m_accept": self.proxy.stats.m_accept, "c_k": self.proxy.stats.c_k, "blocks": self.proxy.blocks,
                "val_loss": self.proxy.val_loss, "val_loss_k": list(self.proxy.losses),
                "covered": self.proxy.covered, "stride": self.proxy.stride,
            }  # fmt: skip
        return {
            "drafter": self.drafter,
            "kind": self.kind,
            "setting": self.setting,
            "num_drafts": self.num_drafts,
            "target": self.target.name,
            "mode": self.target.describe(),
            "activations": self.target.activations,
            "kv_cache_dtype": self.target.kv_cache_dtype,
            "tau": stats.tau,
            "m_accept": stats.m_accept,
            "c_k": stats.c_k,
            "val_loss": None if self.proxy is None else self.proxy.val_loss,
            "blocks": None if self.proxy is None else self.proxy.blocks,
            "generation": stats.to_json(),
            "proxy": proxy,
            "ngram": self.ngram.to_json(),
            "repeated_8grams": self.repeated_8grams,
            "difference": _fields(self.difference),
            "proxy_difference": _fields(self.proxy_difference),
        }


FIGURES = ("tau", "m_accept", "c_k", "val_loss", "blocks")
"""Of a row, by their names in JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """All drafters in all settings on all targets."""

    rows: tuple[EvalRow, ...]
    dataset: str
    num_prompts: int
    num_tokens: int
    """Generated by each target."""
    options: EvalOptions
    invariant: bool
    """Whether kernels are: then these are the steps of generation to the last bit."""
    command: str | None = None

    def of(self, drafter: str) -> EvalResult:
        """One drafter's rows."""
        return replace(self, rows=tuple(row for row in self.rows if row.drafter == drafter))

    def to_json(self) -> dict[str, Any]:
        """Settings, the figures of the first row (most evaluations have one), and all rows."""
        o, rows = self.options, [row.to_json() for row in self.rows]
        first = {key: rows[0][key] for key in FIGURES} if rows else {}
        return {
            "dataset": self.dataset, "num_prompts": self.num_prompts, "prompt_tokens": o.prompt_tokens,
            "max_tokens": o.max_tokens, "generated_tokens": self.num_tokens, "temperature": o.temperature,
            "ignore_eos": o.ignore_eos, "seed": o.seed, "stride": o.stride, "invariant": self.invariant,
            **first, "results": rows,
        }  # fmt: skip


def _fields(difference: Difference | None) -> dict[str, float] | None:
    return None if difference is None else dataclasses.asdict(difference)
