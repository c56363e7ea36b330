"""The page about a checkpoint: verdict, sizes, scales, experts, findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from m27quant.report import page_drawings as drawings
from m27quant.report import page_words as words
from m27quant.report.facts import logits_rows, measured_rows, serving_table
from m27quant.report.measured import Measured, contradictions
from m27quant.report.page import GENERATOR, fill
from m27quant.report.recorded import Recorded
from m27quant.report.text import plural, summary
from m27quant.verify.findings import VerifyResult

MAX_NOTICES = 100


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


def render(page: Page) -> str:
    """The page as ASCII HTML."""
    recorded, unrecorded = _fitting(page)
    maps = drawings.maps(page.measured, recorded)
    told = page.result.facts
    logits = told.get("logits") or {}
    return fill(
        "report.html.jinja",
        brand=GENERATOR,
        result=page.result,
        name=Path(page.result.checkpoint).name or page.result.checkpoint,
        verdict=words.verdict(page.result),
        counts=_counts(page),
        about=page.result.checkpoint,
        facts=words.facts(page.result, recorded),
        made=words.made(recorded),
        recorded=recorded,
        unrecorded=unrecorded,
        contradictions=contradictions(recorded, page.measured) if recorded else 0,
        tiles=words.tiles(page.result, page.measured, recorded),
        sizes=words.sizes(page.measured, recorded),
        logits=logits_rows(logits) if logits else [],
        source=measured_rows(told.get("source") or {}),
        evaluated=words.evaluated(recorded),
        serving=serving_table(told),
        charts=drawings.charts(page.measured, recorded, logits.get("layer_sqnr_db") or ()),
        maps=maps,
        cells=Markup(drawings.cells(maps)),  # numbers and our own words, without < > &
        coverage=words.coverage(recorded),
        worst=words.worst(recorded),
        notices=[*recorded.notices[:MAX_NOTICES]] if recorded else [],
        groups=words.groups(page.result.findings),
        licence=page.licence.get("license_name") or page.licence.get("license"),
    )


def _counts(page: Page) -> str:
    accepted = f", {page.accepted:,} accepted" if page.accepted else ""
    checks = plural(len(page.result.checks_run), "check")
    return f"{summary(page.result)}{accepted} in {checks}, level {page.result.level}"


def _fitting(page: Page) -> tuple[Recorded | None, str | None]:
    """The report of the quantization, if it is about a model of this checkpoint's shape."""
    recorded = page.recorded
    if recorded is not None and recorded.shape != page.measured.shape:
        told, stored = ("{} layers of {} experts".format(*s) for s in (recorded.shape, page.measured.shape))
        return None, f"quantization_report.json is about {told}, this checkpoint has {stored}: not used."
    return recorded, page.unrecorded
