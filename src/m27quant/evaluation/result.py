"""What an evaluation found: one row for each candidate and mode, tests between rows, and the JSON document.

Every estimate comes with an interval that covers in 95 % of samplings of whole windows of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Activations = Literal["nvfp4", "bf16"]
KvCache = Literal["fp8", "bf16"]
Metric = Literal["kl", "nll", "top1", "top8", "greedy"]
"""What rows are compared by: KL divergence and negative log-likelihood in nats a token, agreement as a share, and
tokens behind a prompt for which the greedy text is the reference's."""

METRICS: tuple[Metric, ...] = ("kl", "nll", "top1", "top8")
"""Of them those that each window of text has; greedy texts have prompts of their own."""
TOP = 8
"""How many of the likeliest tokens `top8` compares."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; NaN where it is not a number, the ends too where one window is all there is."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """`value`, `low`, `high`."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateResult:
    """One candidate in one mode, against the reference on the same tokens."""

    checkpoint: str
    """As it was named."""
    label: str
    """Short, and its own among all rows: the folder's name, and the mode where there are several."""
    is_quantized: bool
    """Its experts' weights are NVFP4."""
    activations: Activations
    """Inputs of the experts' products: nvfp4 (W4A4) or bf16 (not rounded)."""
    kv_cache_dtype: KvCache
    """Keys and values: fp8 (E4M3 under the checkpoint's scales) or bf16 (not rounded)."""
    non_finite: int
    """Tokens whose logits are not all finite; figures that they are part of are NaN."""
    perplexity: Estimate
    perplexity_ratio: Estimate
    """To the reference's, on the same tokens."""
    kl_mean: Estimate
    """Of the row's distribution from the reference's, in nats, over all tokens."""
    kl_p99: Estimate
    """The smallest KL that 99 % of the tokens are not above."""
    kl_max: float
    """Of the token where it is largest: a property of this text, so without an interval."""
    top1: Estimate
    """Share of tokens for which both hold the same next token for the likeliest."""
    top8: Estimate
    """Mean share of the reference's 8 likeliest tokens that are among the row's."""
    router: tuple[Estimate, ...]
    """Per layer, share of tokens that go to the same set of experts as in the reference."""
    layer_sqnr_db: tuple[Estimate, ...]
    """Per layer, of the hidden states behind it, all that comes before included; inf where they are equal."""
    greedy: Mapping[str, Any] | None = None
    """How long greedy text stays the reference's; None where it was not measured."""
    health: Mapping[str, Any] | None = None
    """Of generated texts; None where nothing was generated."""
    tasks: Mapping[str, Any] | None = None
    """lm-eval's figures by task; None where none was asked for."""

    @property
    def name(self) -> str:
        """The checkpoint without the folders that it lies in."""
        return self.checkpoint.rstrip("/").rpartition("/")[2]

    @property
    def mode(self) -> str:
        """Weights, activations and cache in short."""
        weights = ("W4A4" if self.activations == "nvfp4" else "W4A16") if self.is_quantized else "unquantized"
        return f"{weights}, {self.kv_cache_dtype.upper()} KV"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "label": self.label,
            "checkpoint": self.checkpoint,
            "mode": self.mode,
            "activations": self.activations,
            "kv_cache_dtype": self.kv_cache_dtype,
            "non_finite": self.non_finite,
            "perplexity": self.perplexity.to_json(),
            "perplexity_ratio": self.perplexity_ratio.to_json(),
            "kl": {"mean": self.kl_mean.to_json(), "p99": self.kl_p99.to_json(), "max": self.kl_max},
            "top1": self.top1.to_json(),
            "top8": self.top8.to_json(),
            "router": [layer.to_json() for layer in self.router],
            "layer_sqnr_db": [layer.to_json() for layer in self.layer_sqnr_db],
            "greedy": None if self.greedy is None else dict(self.greedy),
            "health": None if self.health is None else dict(self.health),
            "tasks": None if self.tasks is None else dict(self.tasks),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two rows on the same windows, compared by one metric; they differ in the checkpoint alone or the mode alone."""

    a: str
    b: str
    """Labels of rows."""
    metric: Metric
    difference: float
    """a minus b, per token."""
    low: float
    high: float
    p: float
    """Two-sided, by flipping signs of whole windows; corrected by Holm over all pairs of this metric."""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("a", "b", "metric", "difference", "low", "high", "p")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All that one evaluation found."""

    reference: str
    """As it was named."""
    reference_perplexity: Estimate
    dataset: tuple[str, ...]
    digest: str
    """SHA-256 of the token ids and of where windows end: the same for two evaluations on the same tokens."""
    num_windows: int
    num_tokens: int
    seq_len: int
    """Tokens of a window at most."""
    seed: int
    candidates: tuple[CandidateResult, ...]
    pairs: tuple[Pair, ...]
    reference_health: Mapping[str, Any] | None = None
    """Of the reference's generated texts; None where nothing was generated."""
    reference_tasks: Mapping[str, Any] | None = None
    """lm-eval's figures of the reference; None where none was asked for, or of another server alone."""
    failures: tuple[str, ...] = field(default=())
    """What is beyond the limits that were asked for, or not a number, one line each; empty where nothing is."""

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        return not self.failures

    def of(self, checkpoint: str) -> Evaluation:
        """One candidate's rows and the tests between them."""
        rows = tuple(row for row in self.candidates if row.checkpoint == checkpoint)
        own = {row.label for row in rows}
        return replace(self, candidates=rows, pairs=tuple(p for p in self.pairs if {p.a, p.b} <= own))

    def document(self) -> dict[str, Any]:
        """The JSON document without its `schema_version`; floats may be NaN or infinite, which writers turn to null."""
        return {
            "reference": {
                "checkpoint": self.reference,
                "perplexity": self.reference_perplexity.to_json(),
                "health": None if self.reference_health is None else dict(self.reference_health),
                "tasks": None if self.reference_tasks is None else dict(self.reference_tasks),
            },
            "data": {
                "dataset": list(self.dataset),
                "sha256": self.digest,
                "num_windows": self.num_windows,
                "num_tokens": self.num_tokens,
                "seq_len": self.seq_len,
                "seed": self.seed,
            },
            "ok": self.ok,
            "failures": list(self.failures),
            "candidates": [row.to_json() for row in self.candidates],
            "pairs": [pair.to_json() for pair in self.pairs],
        }
