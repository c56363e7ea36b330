"""quantization_report.json: what was done and what came out of it, for `verify`, the model card and people.

Nothing in it depends on the clock or the machine's speed: the same run gives the same bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA_VERSION = 1
PROJECTIONS = ("w1", "w2", "w3")


def build_report(
    *,
    version: str,
    fingerprint: Mapping[str, Any],
    source: Mapping[str, Any],
    recipe: Mapping[str, Any],
    calibration: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    shards: Mapping[str, Mapping[str, Any]],
    files: Sequence[str],
    sizes: Mapping[str, int],
    notices: Sequence[str],
) -> dict[str, Any]:
    """The report's object.

    Args:
        version: of m27quant.
        fingerprint: what a resumed run must agree with.
        source: where the weights came from.
        recipe: name and resolved content.
        calibration: rows, tokens, coverage mode.
        records: one per decoder layer, in order, as the journal has them.
        shards: final file name -> size and sha256.
        files: every file of the checkpoint.
        sizes: bytes of source and output.
        notices: what the user should know.
    """
    layers = [{"layer": i, **record} for i, record in enumerate(records)]
    return {
        "schema_version": SCHEMA_VERSION,
        "producer": {"name": "m27quant", "version": version},
        "fingerprint": dict(fingerprint),
        "source": dict(source),
        "recipe": dict(recipe),
        "calibration": dict(calibration),
        "summary": summarize(records, sizes),
        "notices": list(notices),
        "files": sorted(files),
        "shards": {name: dict(entry) for name, entry in shards.items()},
        "layers": layers,
    }


def summarize(records: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The figures of the closing summary."""
    sqnr = [
        (v, i, p, e)
        for i, r in enumerate(records)
        for p in PROJECTIONS
        for e, v in enumerate(r["sqnr_db"][p])
        if v is not None
    ]
    summary: dict[str, Any] = {
        **sizes,
        "compression": round(sizes["source_bytes"] / sizes["output_bytes"], 4),
        "sqnr_db": {"mean": round(statistics.fmean(v[0] for v in sqnr), 3), "worst": sqnr_entry(min(sqnr))}
        if sqnr
        else None,
        "worst_layers": worst_layers(records),
        "scales": {
            "weight_scale_2": _range(records, "weight_scale_2"),
            "input_scale": _range(records, "input_scale"),
            "k_scale": _flat_range(r["k_scale"] for r in records if "k_scale" in r),
            "v_scale": _flat_range(r["v_scale"] for r in records if "v_scale" in r),
        },
        "coverage": coverage(records),
        "dead_matrices": sum(len(r["dead"]) for r in records),
        "zero_groups": sum(r["zero_groups"] for r in records),
        "saturated_groups": sum(r["saturated_groups"] for r in records),
        "tiny_groups": sum(r["tiny_groups"] for r in records),
        "non_finite_activations": sum(r["non_finite_activations"] for r in records),
        "zero_ranges": [name for r in records for name in r["zero_range"]],
    }
    if gained := output_gain([r["output_error"] for r in records if "output_error" in r]):
        summary["output_error_of_maxima"] = gained
    return summary


def output_gain(errors: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Of each projection the error of outputs relative to that under block maxima, on average over layers."""
    found = {}
    for projection in PROJECTIONS:
        shares = [of["gptq"] / of["max"] for e in errors if (of := e.get(projection)) and of.get("max")]
        if shares:
            found[projection] = round(statistics.fmean(shares), 4)
    return found


def sqnr_entry(entry: tuple[float, int, str, int]) -> dict[str, Any]:
    """One matrix's figure with its place."""
    value, layer, projection, expert = entry
    return {"db": value, "layer": layer, "expert": expert, "projection": projection}


def worst_layers(records: Sequence[Mapping[str, Any]], count: int = 5) -> list[dict[str, Any]]:
    """Layers by the mean SQNR of their experts, worst first."""
    rows = []
    for layer, record in enumerate(records):
        values = [v for p in PROJECTIONS for v in record["sqnr_db"][p] if v is not None]
        if values:
            rows.append(
                {"layer": layer, "mean_db": round(statistics.fmean(values), 3), "min_db": min(values)}
            )
    return sorted(rows, key=lambda r: (r["mean_db"], r["layer"]))[:count]


def coverage(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many tokens each expert's ranges rest on, and how many natural routing would have given it."""
    seen = [n for r in records for n in r["seen_tokens"]]
    routed = [n for r in records for n in r["routed_tokens"]]
    return {
        "seen_tokens_min": min(seen),
        "seen_tokens_max": max(seen),
        "routed_tokens_min": min(routed),
        "routed_tokens_median": statistics.median(routed),
        "routed_tokens_max": max(routed),
        "experts": len(routed),
        "cold_experts": sum(n == 0 for n in routed),
    }


def _range(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, float]]:
    return {p: found for p in PROJECTIONS if (found := _flat_range(v for r in records for v in r[key][p]))}


def _flat_range(values: Any) -> dict[str, float] | None:
    found = list(values)
    return {"min": min(found), "max": max(found)} if found else None
