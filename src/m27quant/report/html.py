"""One self-contained page about a checkpoint: verdict, sizes, scales, experts, findings.

It loads nothing, which its own content security policy enforces: one script, known by its hash, no address at all.
Every string passes through `line` and Jinja's escaping, and the page is ASCII, so that no reader's encoding matters.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

import m27quant
from m27quant.report import plots
from m27quant.report.measured import Measured, Table, contradictions
from m27quant.report.plots import Series, number, over_experts
from m27quant.report.recorded import Recorded
from m27quant.report.text import details, line, plural, size, summary
from m27quant.verify.findings import Finding, VerifyResult

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = "m27quant report"
"""Names the page's author in its head; a file that has it may be replaced."""
MAX_FINDINGS = 50
"""Shown of one check."""
MAX_NOTICES = 100
MAX_COLD = 12
PROJECTIONS = ("w1", "w2", "w3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All that a page tells."""

    result: VerifyResult
    measured: Measured
    recorded: Recorded | None = None
    unrecorded: str | None = None
    """Why there is no report of the quantization to be shown."""
    licence: Mapping[str, str] = field(default_factory=dict)
    accepted: int = 0
    """Findings that are left out, as a baseline accepts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing with its heading."""

    title: str
    note: str
    drawing: Markup
    legend: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """A heat map with its ramp, and the numbers behind it."""

    title: str
    note: str
    drawing: Markup
    ramp: Markup
    values: Table


def render(page: Page) -> str:
    """The page as ASCII HTML."""
    recorded, unrecorded = _fitting(page)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_safe,
    )
    environment.filters |= {"size": size, "number": number, "plural": plural}
    script = (TEMPLATES / "report.js").read_text(encoding="ascii")
    maps = _maps(page.measured, recorded)
    text = environment.get_template(
        "report.html.jinja"
    ).render(
        generator=GENERATOR,
        version=m27quant.__version__,
        result=page.result,
        name=Path(page.result.checkpoint).name or page.result.checkpoint,
        verdict=_verdict(page.result),
        counts=summary(page.result) + (f", {page.accepted:,} accepted" if page.accepted else ""),
        facts=_facts(page, recorded),
        made=_made(recorded),
        recorded=recorded,
        unrecorded=unrecorded,
        contradictions=contradictions(recorded, page.measured) if recorded else 0,
        tiles=_tiles(page, recorded),
        sizes=_sizes(page, recorded),
        charts=_charts(page.measured, recorded),
        maps=maps,
        cells=Markup(_cells(maps)),  # numbers and our own words, without < > &
        coverage=_coverage(recorded),
        worst=_worst(recorded),
        notices=[*recorded.notices[:MAX_NOTICES]] if recorded else [],
        groups=_groups(page.result.findings),
        licence=page.licence.get("license_name") or page.licence.get("license"),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="ascii")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return text.encode("ascii", "xmlcharrefreplace").decode()


def _safe(value: object) -> object:
    return line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _fitting(page: Page) -> tuple[Recorded | None, str | None]:
    """The report of the quantization, if it is about a model of this checkpoint's shape."""
    recorded = page.recorded
    if recorded is not None and recorded.shape != page.measured.shape:
        told, stored = ("{} layers of {} experts".format(*s) for s in (recorded.shape, page.measured.shape))
        return None, f"quantization_report.json is about {told}, this checkpoint has {stored}: not used."
    return recorded, page.unrecorded


# -- words -----------------------------------------------------------------------------------------


def _verdict(result: VerifyResult) -> tuple[str, str, str]:
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


def _facts(page: Page, recorded: Recorded | None) -> list[tuple[str, str]]:
    """What the checkpoint is."""
    facts, rows = page.result.facts, []
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


def _made(recorded: Recorded | None) -> list[tuple[str, str]]:
    """How it was made."""
    if recorded is None:
        return []
    c, source = recorded.calibration, recorded.source
    commit = f" at {source.commit}" if source.commit else ""
    full = c.moe_calib == "full"
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
    ]


def _tiles(page: Page, recorded: Recorded | None) -> list[tuple[str, str, str]]:
    """(figure, what it is, more) for the top of the page."""
    tiles = [(size(page.result.facts.get("total_bytes", 0)), "on disk", "all shards, headers included")]
    if recorded:
        s = recorded.summary
        ratio = s.source_bytes / s.output_bytes
        tiles[0] = (
            size(s.output_bytes),
            "of weights",
            f"{ratio:.2f} times smaller than {size(s.source_bytes)}",
        )
        quality_LEP = _quality(recorded)
        known = quality_LEP[~np.isnan(quality_LEP)]
        if known.size:
            layer, expert, p = np.unravel_index(np.nanargmin(quality_LEP), quality_LEP.shape)
            where = f"worst {known.min():.2f} dB: layer {layer}, expert {expert}, {PROJECTIONS[p]}"
            tiles.append((f"{known.mean():.2f} dB", "mean weight SQNR", where))
        routed_LE = _routed(recorded)
        cold = int((routed_LE == 0).sum())
        tiles.append((f"{cold:,}", "cold experts", f"of {routed_LE.size:,}: no token by natural routing"))
    known_LE = ~np.isnan(page.measured.input_scale).any(axis=2)
    if known_LE.size:
        share = known_LE.mean()
        shown = "100%" if share == 1 else f"{min(share, 0.9999):.2%}"
        tiles.append((shown, "experts with input scales", f"{int(known_LE.sum()):,} of {known_LE.size:,}"))
    return tiles


def _sizes(page: Page, recorded: Recorded | None) -> dict[str, Any]:
    """Bars of source and output, and what the output is made of, in percent."""
    families = page.measured.bytes_by_family
    total = sum(families.values()) or 1
    bars = [("this checkpoint", total)]
    if recorded:
        bars.insert(0, ("source", recorded.summary.source_bytes))
    longest = max(size for _, size in bars)
    return {
        "bars": [(name, size, 100 * size / longest) for name, size in bars],
        "families": [(name, size, 100 * size / total) for name, size in families.items()],
    }


def _coverage(recorded: Recorded | None) -> list[tuple[int, int, int, int]]:
    """The experts with the fewest routed tokens: (layer, expert, routed, seen)."""
    if recorded is None:
        return []
    rows = [
        (r.layer, expert, routed, seen)
        for r in recorded.layers
        for expert, (routed, seen) in enumerate(zip(r.routed_tokens, r.seen_tokens, strict=True))
    ]
    return sorted(rows, key=lambda row: (row[2], row[0], row[1]))[:MAX_COLD]


def _worst(recorded: Recorded | None) -> list[tuple[int, int, str, float]]:
    """The matrices with the least SQNR: (layer, expert, projection, dB)."""
    if recorded is None:
        return []
    quality_LEP = _quality(recorded)
    order = np.argsort(quality_LEP, axis=None, kind="stable")[:MAX_COLD]  # NaN comes last
    places = (np.unravel_index(at, quality_LEP.shape) for at in order)
    return [
        (int(n), int(e), PROJECTIONS[p], float(quality_LEP[n, e, p]))
        for n, e, p in places
        if not np.isnan(quality_LEP[n, e, p])
    ]


def _groups(findings: Sequence[Finding]) -> list[dict[str, Any]]:
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


# -- drawings --------------------------------------------------------------------------------------


def _quality(recorded: Recorded) -> Table:
    """SQNR in dB, [L, E, P]; NaN where a matrix is all zero."""
    rows = [[getattr(r.sqnr_db, p) for p in PROJECTIONS] for r in recorded.layers]
    return np.array(rows, np.float64).transpose(0, 2, 1)


def _routed(recorded: Recorded) -> Table:
    """Tokens that natural routing gave each expert, [L, E]."""
    return np.array([r.routed_tokens for r in recorded.layers], np.float64)


def _charts(measured: Measured, recorded: Recorded | None) -> list[Chart]:
    charts = []
    if recorded:
        quality = _quality(recorded)
        of_layers = over_experts("mean, worst to best", quality.reshape(len(quality), -1), middle=np.mean)
        assert of_layers.low is not None
        worst = Series(name="worst", mid=of_layers.low)
        title, note = (
            "Weight SQNR by layer",
            "Signal over quantization noise of the experts' weights in dB; more is better.",
        )
        charts.append(_chart(title, note, [of_layers, worst]))
    for part, what in (
        ("weight_scale_2", "Largest weight over 2688"),
        ("input_scale", "Largest input over 2688"),
    ):
        table_LEP = getattr(measured, part)
        same = np.array_equal(table_LEP[..., 0], table_LEP[..., 2], equal_nan=True)
        names = {0: "w1 = w3", 1: "w2"} if same else {0: "w1", 1: "w2", 2: "w3"}
        rows = [over_experts(name, table_LEP[..., p]) for p, name in names.items()]
        charts.append(_chart(f"{part} by layer", f"{what}; median and range of the experts.", rows, log=True))
    kv = [Series(name=name, mid=measured.kv_scale[:, n]) for n, name in enumerate(("k_scale", "v_scale"))]
    charts.append(_chart("KV cache scales by layer", "Largest key and value over 448.", kv, log=True))
    if recorded:
        routed = over_experts("median, least to most", _routed(recorded))
        charts.append(
            _chart(
                "Routed tokens by layer",
                "Calibration tokens that natural routing gives an expert.",
                [routed],
                log=True,
            )
        )
    return [chart for chart in charts if chart is not None]


def _chart(title: str, note: str, series: list[Series], *, log: bool = False) -> Chart | None:
    drawing = plots.lines(series, label=title, log=log) if len(series[0].mid) else None
    if drawing is None:
        return None
    return Chart(title=title, note=note, drawing=drawing, legend=tuple(s.name for s in series))


def _maps(measured: Measured, recorded: Recorded | None) -> list[Map]:
    maps = []
    if recorded:
        quality_LEP = _quality(recorded)
        worst_LE = np.where(np.isnan(quality_LEP), np.inf, quality_LEP).min(axis=2)
        worst_LE = np.where(np.isinf(worst_LE), np.nan, worst_LE)
        maps.append(_map("SQNR", "dB, the worst of w1, w2 and w3.", worst_LE))
        maps.append(
            _map("Routed tokens", "By natural routing, on a logarithmic ramp.", _routed(recorded), log=True)
        )
    note = "Colour: powers of two from the layer's median; 1 is twice as much, -1 half."
    for part in ("weight_scale_2", "input_scale"):
        for p, name in ((0, "w1"), (1, "w2")):
            table_LE = getattr(measured, part)[..., p]
            maps.append(_map(f"{part} {name}", note, _from_median(table_LE), told=table_LE, diverging=True))
    return [m for m in maps if m is not None]


def _from_median(table_LE: Table) -> Table:
    """log2 of each expert's share of its layer's median."""
    ratio_LE = np.full_like(table_LE, np.nan)
    for layer, row in enumerate(table_LE):
        there = ~np.isnan(row)
        if there.any():
            ratio_LE[layer, there] = np.log2(row[there]) - np.log2(np.median(row[there]))
    return ratio_LE


def _map(
    title: str,
    note: str,
    table_LE: Table,
    *,
    told: Table | None = None,
    diverging: bool = False,
    log: bool = False,
) -> Map | None:
    """`told` are the numbers that a pointer reads, where they are not those that are drawn."""
    if not table_LE.size or np.isnan(table_LE).all():
        return None
    drawing, ramp = plots.heat_map(table_LE, label=f"{title} of each expert", diverging=diverging, log=log)
    values = table_LE if told is None else told
    return Map(title=title, note=note, drawing=drawing, ramp=ramp, values=values)


def _cells(maps: Sequence[Map]) -> str:
    """The numbers of all maps for the page's script."""
    content = [{"title": m.title, "values": [_plain(v) for v in m.values.ravel().tolist()]} for m in maps]
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _plain(value: float) -> float | int | None:
    if np.isnan(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.4g}")
