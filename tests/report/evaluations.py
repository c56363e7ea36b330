"""Evaluations without models behind them."""

from __future__ import annotations

import math
from typing import Any

from m27quant.evaluation.result import CandidateResult, Estimate, Evaluation, Pair

LAYERS = 3


def around(value: float, half: float = 0.01) -> Estimate:
    return Estimate(value, value - half, value + half)


def share(value: float) -> dict[str, float]:
    return {"value": value, "low": value / 2, "high": (1 + value) / 2}


GREEDY = {
    "num_prompts": 4, "max_tokens": 8, "compared_by": "both texts", "tokens": around(4.5, 2).to_json(), "median": 3,
    "identical": share(0.25), "points": [8, 3, 1, 6],
}  # fmt: skip
HEALTH = {
    "num_texts": 4, "spurious_spaces": share(0.01), "repetition": share(0.125), "broken_characters": share(0.0),
    "num_tool_prompts": 0, "valid_tool_calls": None,
}  # fmt: skip
TASKS = {
    "gsm8k": {
        "version": 3.0, "num_samples": 200, "num_fewshot": 5,
        "metrics": {"exact_match,strict-match": around(0.625).to_json(), "exact_match,none": around(0.75).to_json()},
    }
}  # fmt: skip
NO_TEXT = {"not_measured": "needs 460 GB of memory"}


def row(label: str, kl: float = 0.02, **fields: Any) -> CandidateResult:
    given: dict[str, Any] = {
        "checkpoint": f"/data/{label}", "label": label, "is_quantized": True, "activations": "nvfp4",
        "kv_cache_dtype": "fp8", "non_finite": 0, "perplexity": around(18.9), "perplexity_ratio": around(1.017),
        "kl_mean": around(kl, kl / 4), "kl_p99": around(4 * kl), "kl_max": 1.25, "top1": around(0.918),
        "top8": around(0.93), "router": tuple(around(1 - 0.05 * n) for n in range(LAYERS)),
        "layer_sqnr_db": tuple(around(24.0 - n, 0.5) for n in range(LAYERS)), "greedy": GREEDY, "health": HEALTH,
    }  # fmt: skip
    return CandidateResult(**given | fields)


def evaluation(*rows: CandidateResult, **fields: Any) -> Evaluation:
    given: dict[str, Any] = {
        "reference": "/data/models/m27", "reference_perplexity": around(18.6), "reference_health": NO_TEXT,
        "dataset": ("/data/heldout.txt",), "digest": "ab" * 32, "num_windows": 12, "num_tokens": 6144, "seq_len": 512,
        "seed": 0, "candidates": rows, "pairs": (),
    }  # fmt: skip
    return Evaluation(**given | fields)


def pair(a: str, b: str, difference: float, p: float, metric: Any = "kl") -> Pair:
    return Pair(a=a, b=b, metric=metric, difference=difference, low=difference - 1, high=difference + 1, p=p)


NAN = Estimate(math.nan, math.nan, math.nan)
BROKEN = row(
    "broken", non_finite=7, perplexity=NAN, perplexity_ratio=NAN, kl_mean=NAN, kl_p99=NAN, kl_max=math.nan, top1=NAN,
    top8=NAN, router=(NAN,) * LAYERS, layer_sqnr_db=(Estimate(math.inf, math.nan, math.nan), NAN, NAN),
    greedy=NO_TEXT, health=NO_TEXT,
)  # fmt: skip
"""Nothing of it is a number."""
EQUAL = row(
    "equal",
    kl=0.0,
    layer_sqnr_db=(Estimate(math.inf, math.inf, math.inf),) * LAYERS,
    greedy=None,
    health=None,
)
"""Nothing was quantized."""
EVIL = '<script>alert(1)</script>\x1b[31m|`]("\N{RIGHT-TO-LEFT OVERRIDE}'
