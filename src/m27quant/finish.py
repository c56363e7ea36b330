"""The result of a quantization: its report, its small files, and which work file becomes which shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import m27quant
from m27quant.checkpoint import sidecars
from m27quant.checkpoint.card import licence_of, render_card
from m27quant.checkpoint.paths import existing
from m27quant.checkpoint.quant_config import hf_quant_config, output_config, quantization_config
from m27quant.checkpoint.source import INDEX
from m27quant.checkpoint.workspace import CONFIG, REPORT
from m27quant.plan import Plan
from m27quant.prepare import Options, Prepared
from m27quant.report.quantization import build_report

OWN_DOCUMENTS = (CONFIG, "hf_quant_config.json", INDEX, REPORT, "README.md")


def build_result(
    prepared: Prepared,
    done: Mapping[str, Mapping[str, Any]],
    dropped: Sequence[int],
    fingerprint: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str], dict[str, bytes]]:
    """(report, work file -> final shard name, small files).

    Args:
        prepared: the source and the plan.
        done: the journal's entry of every unit by its name.
        dropped: calibration rows that gave NaN or Inf.
        fingerprint: the run's.
    """
    source, plan = prepared.source, prepared.plan
    units = [done[unit.name] for unit in plan.units]
    records = [e["record"] for e in units if "record" in e]
    written = [f for e in units for f in e["files"] if not is_hidden(f)]
    finals = plan.shard_names()
    shards = {f["name"]: final for f, final in zip(written, finals, strict=True)}
    documents = dict(prepared.documents)
    section = quantization_config(plan.exclude, plan.resolved.kv_cache)
    keep_code = sidecars.has_remote_code(documents)
    documents[CONFIG] = sidecars.to_json(output_config(source.raw_config, section, keep_auto_map=keep_code))
    documents["hf_quant_config.json"] = sidecars.to_json(
        hf_quant_config(plan.exclude, plan.resolved.kv_cache)
    )
    documents[INDEX] = _index(plan, finals)
    location = source.location
    base_model = location.repo_id or source.folder.name
    report = build_report(
        version=m27quant.__version__,
        fingerprint=fingerprint,
        source={"name": base_model, "repo_id": location.repo_id, "commit": location.commit},
        recipe=shown_recipe(prepared),
        calibration=_calibration(prepared, dropped) | _asked(fingerprint),
        records=records,
        shards={
            final: {key: f[key] for key in ("size", "sha256", "xxh3_128") if key in f}
            for f, final in zip(written, finals, strict=True)
        },
        files=[*finals, *documents, REPORT, "README.md"],
        sizes={
            "source_bytes": source.total_bytes,
            "output_bytes": plan.tensor_bytes,
            "num_tensors": plan.num_tensors,
        },
        notices=[*prepared.notices, *_findings(records, dropped)],
    )
    documents[REPORT] = sidecars.to_json(report)
    card = render_card(
        report,
        base_model=base_model,
        is_hub_model=location.repo_id is not None,
        licence=licence_of(source.folder),
    )
    documents["README.md"] = card.encode("utf-8", "backslashreplace")
    return report, shards, documents


def output_names(prepared: Prepared, options: Options) -> list[str]:
    """Every file that OUT will hold."""
    if options.calibrate_only or options.layers is not None:
        return []
    return [*prepared.plan.shard_names(), *prepared.documents, *OWN_DOCUMENTS]


def is_hidden(file: Mapping[str, Any]) -> bool:
    """A file of the journal that holds hidden states, which are gone once the next layer is done."""
    return str(file["name"]).startswith("hidden-")


def shown_recipe(prepared: Prepared) -> dict[str, Any]:
    """The recipe as the report shows it."""
    canonical = prepared.recipe.canonical()
    for dataset in canonical["calibration"]["datasets"]:
        dataset["path"] = _shown(dataset["path"])
    return {"name": prepared.recipe.name, "kv_cache": prepared.plan.resolved.kv_cache, **canonical}


def _shown(dataset: str) -> str:
    """A Hub data set by its id, a local file by its name: where it lay is nobody's business."""
    return Path(dataset).name if Path(dataset).is_file() else dataset


def _calibration(prepared: Prepared, dropped: Sequence[int]) -> dict[str, Any]:
    calibration = prepared.recipe.calibration
    return {
        "datasets": [Path(d.path).name if existing(d.path) else d.path for d in calibration.datasets],
        "num_samples": len(prepared.sequences.lengths),
        "num_tokens": prepared.sequences.num_tokens,
        "seq_len": calibration.seq_len,
        "moe_calib": prepared.plan.resolved.moe_calib,
        "tokens_sha256": prepared.sequences.digest,
        "dropped_rows": sorted(dropped),
    }


def _asked(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What input ranges are, where they are not the largest values."""
    return {key: fingerprint[key] for key in ("input_range",) if key in fingerprint}


def _findings(records: Sequence[Mapping[str, Any]], dropped: Sequence[int]) -> list[str]:
    """What the work itself found noteworthy."""
    zero = [name for r in records for name in r["zero_range"]]
    dead = [name for r in records for name in r["dead"]]
    found = [*_damped(records)]
    if dropped:
        found.append(f"{len(dropped)} calibration rows gave NaN or Inf and were dropped")
    if dead:
        found.append(f"{len(dead)} expert matrices are all zero ({dead[0]} ...)")
    if zero:
        found.append(
            f"{len(zero)} ranges were zero and take the widest of their kind in the layer ({zero[0]} ...)"
        )
    return found


def _damped(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Hessians that could be factorized with more damping only: their matrices are nearer to packing without them."""
    factors = [
        (damping, attempts, layer, place)
        for layer, record in enumerate(records)
        for kind, of in record.get("hessians", {}).items()
        for expert, (damping, attempts) in enumerate(zip(of["damping"], of["attempts"], strict=True))
        for place in [f"expert {expert}, w2" if kind == "w2" else "w1 and w3 of all experts"]
    ]
    more = [factor for factor in factors if factor[1] > 1]
    if more:
        damping, _, layer, place = max(more, key=lambda factor: factor[0])
        yield (
            f"{len(more)} of {len(factors)} Hessians took more damping than the first; most, {damping:g} of the mean "
            f"diagonal: layer {layer}, {place}"
        )


def _index(plan: Plan, finals: Sequence[str]) -> bytes:
    shards = [s for u in plan.units for s in u.shards]
    weight_map = {name: final for shard, final in zip(shards, finals, strict=True) for name in shard.offsets}
    index = {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
