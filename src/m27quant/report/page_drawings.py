"""What a page draws: charts over layers and maps of layers x experts, each with its heading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from m27quant.report import plots
from m27quant.report.heat_map import heat_map
from m27quant.report.measured import Measured, Table
from m27quant.report.plots import Series, over_experts
from m27quant.report.recorded import Recorded, quality, routed


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


def charts(measured: Measured, recorded: Recorded | None, states_db: Sequence[float] = ()) -> list[Chart]:
    """One number of each layer; `states_db` is the SQNR of the hidden states behind it."""
    charts = []
    if recorded:
        quality_LEP = quality(recorded)
        of_layers = over_experts(
            "mean, worst to best", quality_LEP.reshape(len(quality_LEP), -1), middle=np.mean
        )
        assert of_layers.low is not None
        worst = Series(name="worst", mid=of_layers.low)
        title, note = (
            "Weight SQNR by layer",
            "Signal over quantization noise of the experts' weights in dB; more is better.",
        )
        charts.append(_chart(title, note, [of_layers, worst]))
    if states_db:
        finite = np.array([v if v < 1e9 else np.nan for v in states_db], np.float64)
        note = "Behind each layer, against the source's on the same text, in dB; all layers before included."
        charts.append(_chart("SQNR of hidden states by layer", note, [Series(name="SQNR", mid=finite)]))
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
        tokens = over_experts("median, least to most", routed(recorded))
        charts.append(
            _chart(
                "Routed tokens by layer",
                "Calibration tokens that natural routing gives an expert.",
                [tokens],
                log=True,
            )
        )
    return [chart for chart in charts if chart is not None]


def _chart(title: str, note: str, series: list[Series], *, log: bool = False) -> Chart | None:
    drawing = plots.lines(series, label=title, log=log) if len(series[0].mid) else None
    if drawing is None:
        return None
    return Chart(title=title, note=note, drawing=drawing, legend=tuple(s.name for s in series))


def maps(measured: Measured, recorded: Recorded | None) -> list[Map]:
    """One number of each expert."""
    maps = []
    if recorded:
        quality_LEP = quality(recorded)
        worst_LE = np.where(np.isnan(quality_LEP), np.inf, quality_LEP).min(axis=2)
        worst_LE = np.where(np.isinf(worst_LE), np.nan, worst_LE)
        maps.append(_map("SQNR", "dB, the worst of w1, w2 and w3.", worst_LE))
        maps.append(
            _map("Routed tokens", "By natural routing, on a logarithmic ramp.", routed(recorded), log=True)
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
    drawing, ramp = heat_map(table_LE, label=f"{title} of each expert", diverging=diverging, log=log)
    values = table_LE if told is None else told
    return Map(title=title, note=note, drawing=drawing, ramp=ramp, values=values)


def cells(maps: Sequence[Map]) -> str:
    """The numbers of all maps, as JSON for the page's script."""
    content = [{"title": m.title, "values": [_plain(v) for v in m.values.ravel().tolist()]} for m in maps]
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _plain(value: float) -> float | int | None:
    if np.isnan(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.4g}")
