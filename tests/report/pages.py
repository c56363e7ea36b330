"""Pages of any size, without a checkpoint behind them."""

from __future__ import annotations

from typing import Any

import numpy as np

from m27quant.report.html import Page
from m27quant.report.measured import Measured
from m27quant.report.recorded import Recorded
from m27quant.verify.findings import VerifyResult
from tests.report.results import MIXED

PROJECTIONS = ("w1", "w2", "w3")


def report_of(layers: int, experts: int, **fields: Any) -> dict[str, Any]:
    """The content of a quantization_report.json with plausible figures, some experts cold and one matrix dead."""
    random = np.random.default_rng(0)

    def around(middle: float, spread: float) -> dict[str, list[float]]:
        w1 = (middle * np.exp(spread * random.standard_normal(experts))).astype(np.float32).tolist()
        w2 = (2 * middle * np.exp(spread * random.standard_normal(experts))).astype(np.float32).tolist()
        return {"w1": w1, "w2": w2, "w3": w1}

    rows = []
    for layer in range(layers):
        depth = layer / layers
        quality: dict[str, list[float | None]] = {
            p: np.round(20.6 - depth / 3 + 0.08 * random.standard_normal(experts), 3).tolist()
            for p in PROJECTIONS
        }
        routed = random.lognormal(9 - depth, 0.5 + depth, experts).astype(int)
        routed[random.random(experts) < 0.002 * depth] = 0
        rows.append(
            {
                "layer": layer,
                "sqnr_db": quality,
                "weight_scale_2": around(2e-4, 0.2),
                "input_scale": around(2e-3 * (1 + 4 * depth), 0.5),
                "routed_tokens": routed.tolist(),
                "seen_tokens": [524288] * experts,
                "k_scale": 0.01 + 0.02 * depth,
                "v_scale": 0.003 + 0.03 * depth**2,
            }
        )
    rows[-1]["sqnr_db"]["w2"][-1] = None
    given = {
        "schema_version": 1,
        "producer": {"name": "m27quant", "version": "0.1.0"},
        "source": {"name": "MiniMaxAI/MiniMax-M2.7", "repo_id": "MiniMaxAI/MiniMax-M2.7", "commit": "0" * 40},
        "recipe": {"name": "nvfp4_experts_only-fp8_kv", "kv_cache": "fp8"},
        "calibration": {
            "datasets": ["rows.jsonl"],
            "num_samples": 1024,
            "num_tokens": 524288,
            "seq_len": 512,
            "moe_calib": "full",
            "dropped_rows": [],
        },
        "summary": {"source_bytes": 230_000_000_000, "output_bytes": 134_500_000_000},
        "notices": ["rows.jsonl (file) gave 88 of 1024 rows"],
        "layers": rows,
    }
    return {**given, **fields}


def measured_of(report: dict[str, Any]) -> Measured:
    """Tensors that hold what the report says."""
    rows = report["layers"]

    def table(part: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([[row[part][p] for p in PROJECTIONS] for row in rows], float).transpose(0, 2, 1)

    return Measured(
        weight_scale_2=table("weight_scale_2"),
        input_scale=table("input_scale"),
        kv_scale=np.array([[row["k_scale"], row["v_scale"]] for row in rows], float),
        bytes_by_family={"experts": 120_000_000_000, "attention": 10_000_000_000, "embedding": 1_230_000_000},
    )


def page_of(layers: int, experts: int, result: VerifyResult = MIXED, **fields: Any) -> Page:
    """A page of a checkpoint with its report."""
    report = report_of(layers, experts, **fields)
    return Page(result=result, measured=measured_of(report), recorded=Recorded.model_validate(report))
