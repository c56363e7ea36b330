"""What a page says in words and numbers: verdict, facts, tiles, tables, findings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from m27quant.report.evaluation_words import FIGURES, HEALTH, SHARE, TASK, task_title
from m27quant.report.measured import Measured
from m27quant.report.quantization import output_gain
from m27quant.report.recorded import PROJECTIONS, Recorded, quality, routed
from m27quant.report.text import details, plural, size
from m27quant.verify.findings import Finding, VerifyResult

MAX_FINDINGS = 50
"""Shown of one check."""
MAX_COLD = 12


def verdict(result: VerifyResult) -> tuple[str, str, str]:
    """(class, word, sentence)."""
    found = {f.severity.value for f in result.findings}
    if not result.ok:
        return (
            "error",
            "Failed",
            "At least one engine would stop, or compute something else than this model.",
        )
    if "warning" in found:
        return (
            "warning",
            "Passed, with warnings",
            "No error was found; read the warnings before you serve it.",
        )
    return "good", "Passed", "No error and no warning was found."


def facts(result: VerifyResult, recorded: Recorded | None) -> list[tuple[str, str]]:
    """What the checkpoint is."""
    facts, rows = result.facts, []
    layers, experts = facts.get("num_hidden_layers"), facts.get("num_local_experts")
    if layers is not None:
        rows += [
            ("Decoder layers", f"{layers:,}"),
            ("Experts per layer", f"{experts:,} of intermediate size {facts.get('intermediate_size'):,}"),
            ("Hidden size", f"{facts.get('hidden_size'):,}"),
            ("Vocabulary", f"{facts.get('vocab_size'):,}"),
        ]
    rows.append(("Quantization", str(facts.get("quant_algo") or "not declared")))
    cache = str(facts.get("kv_cache", "unknown")).upper()
    if count := facts.get("kv_scales"):
        cache += f", {plural(count, 'scale tensor')}"
    rows.append(("KV cache", cache))
    rows.append(
        ("Tensors", f"{facts.get('num_tensors', 0):,} in {plural(facts.get('num_shards', 0), 'shard')}")
    )
    if recorded:
        rows.append(("Made by", f"{recorded.producer.name} {recorded.producer.version}"))
    return rows


def made(recorded: Recorded | None) -> list[tuple[str, str]]:
    """How it was made."""
    if recorded is None:
        return []
    c, source = recorded.calibration, recorded.source
    commit = f" at {source.commit}" if source.commit else ""
    full = c.moe_calib == "full"
    gained = output_gain([{p: e.model_dump() for p, e in r.output_error.items()} for r in recorded.layers])
    shares = ", ".join(f"{projection} {share:.2f}" for projection, share in gained.items())
    return [
        ("Source", (source.repo_id or source.name) + commit),
        ("Recipe", recorded.recipe.name),
        ("Calibration data", ", ".join(c.datasets)),
        (
            "Calibrated on",
            f"{plural(c.num_samples, 'row')}, {plural(c.num_tokens, 'token')}, at most {c.seq_len:,} a row",
        ),
        (
            "Ranges",
            "every expert saw every token" if full else "natural routing, shared by a layer's experts",
        ),
        ("Rows dropped", f"{len(c.dropped_rows):,}"),
        *([("Error of outputs", f"{shares} of that with scales from block maxima")] if gained else []),
    ]


def evaluated(recorded: Recorded | None) -> dict[str, Any] | None:
    """What `m27quant eval --write-card` has added: a sentence, and a table of figures by mode."""
    found = recorded.evaluation if recorded else None
    if found is None or not found.candidates:
        return None
    rows = found.candidates
    table = [(f.title, f, [row.figure(name) for row in rows]) for name, f in FIGURES.items()]
    table += [(title, SHARE, [row.figure(name) for row in rows]) for name, title in HEALTH.items()]
    tasks = dict.fromkeys(key for row in rows for key in row.of_tasks)
    table += [(task_title(*key), TASK, [row.of_tasks.get(key) for row in rows]) for key in tasks]
    lines = [
        [title, *("none" if e is None else "{} ({})".format(*figure.show(e)) for e in estimates)]
        for title, figure, estimates in table
        if any(e is not None for e in estimates)
    ]
    data = found.data
    told = (
        f"Against {found.reference.checkpoint} on {plural(data.num_tokens, 'token')} of {', '.join(data.dataset)} in "
        f"{plural(data.num_windows, 'window')}; in brackets 95 % intervals."
    )
    return {"told": told, "head": ["", *(row.mode for row in found.candidates)], "lines": lines}


def tiles(result: VerifyResult, measured: Measured, recorded: Recorded | None) -> list[tuple[str, str, str]]:
    """(figure, what it is, more) for the top of the page."""
    tiles = [(size(result.facts.get("total_bytes", 0)), "on disk", "all shards, headers included")]
    if recorded:
        s = recorded.summary
        ratio = s.source_bytes / s.output_bytes
        tiles[0] = (
            size(s.output_bytes),
            "of weights",
            f"{ratio:.2f} times smaller than {size(s.source_bytes)}",
        )
        quality_LEP = quality(recorded)
        known = quality_LEP[~np.isnan(quality_LEP)]
        if known.size:
            layer, expert, p = np.unravel_index(np.nanargmin(quality_LEP), quality_LEP.shape)
            where = f"worst {known.min():.2f} dB: layer {layer}, expert {expert}, {PROJECTIONS[p]}"
            tiles.append((f"{known.mean():.2f} dB", "mean weight SQNR", where))
        routed_LE = routed(recorded)
        cold = int((routed_LE == 0).sum())
        tiles.append((f"{cold:,}", "cold experts", f"of {routed_LE.size:,}: no token by natural routing"))
    known_LE = ~np.isnan(measured.input_scale).any(axis=2)
    if known_LE.size:
        share = known_LE.mean()
        shown = "100%" if share == 1 else f"{min(share, 0.9999):.2%}"
        tiles.append((shown, "experts with input scales", f"{int(known_LE.sum()):,} of {known_LE.size:,}"))
    return tiles


def sizes(measured: Measured, recorded: Recorded | None) -> dict[str, Any]:
    """Bars of source and output, and what the output is made of, in percent."""
    families = measured.bytes_by_family
    total = sum(families.values()) or 1
    bars = [("this checkpoint", total)]
    if recorded:
        bars.insert(0, ("source", recorded.summary.source_bytes))
    longest = max(size for _, size in bars)
    return {
        "bars": [(name, size, 100 * size / longest) for name, size in bars],
        "families": [(name, size, 100 * size / total) for name, size in families.items()],
    }


def coverage(recorded: Recorded | None) -> list[tuple[int, int, int, int]]:
    """The experts with the fewest routed tokens: (layer, expert, routed, seen)."""
    if recorded is None:
        return []
    rows = [
        (r.layer, expert, routed, seen)
        for r in recorded.layers
        for expert, (routed, seen) in enumerate(zip(r.routed_tokens, r.seen_tokens, strict=True))
    ]
    return sorted(rows, key=lambda row: (row[2], row[0], row[1]))[:MAX_COLD]


def worst(recorded: Recorded | None) -> list[tuple[int, int, str, float]]:
    """The matrices with the least SQNR: (layer, expert, projection, dB)."""
    if recorded is None:
        return []
    quality_LEP = quality(recorded)
    order = np.argsort(quality_LEP, axis=None, kind="stable")[:MAX_COLD]  # NaN comes last
    places = (np.unravel_index(at, quality_LEP.shape) for at in order)
    return [
        (int(n), int(e), PROJECTIONS[p], float(quality_LEP[n, e, p]))
        for n, e, p in places
        if not np.isnan(quality_LEP[n, e, p])
    ]


def groups(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings by check; what is the same for all of a check is said once."""
    shared = ("engines", "next step")
    groups = []
    for check, members in groupby(findings, key=lambda f: f.check):
        found = list(members)
        shown = found[:MAX_FINDINGS]
        groups.append(
            {
                "check": check,
                "severity": check.severity.value,
                "places": sum(f.count for f in found),
                "found": [(f.message, [row for row in details(f) if row[0] not in shared]) for f in shown],
                "more": len(found) - len(shown),
            }
        )
    return groups
