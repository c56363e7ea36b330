"""One self-contained page about a checkpoint: verdict, sizes, scales, experts, findings.

It loads nothing, which its own content security policy enforces: one script, known by its hash, no address at all.
Every string passes through `line` and Jinja's escaping, and the page is ASCII, so that no reader's encoding matters.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup

import m27quant
from m27quant.report import page_drawings as drawings
from m27quant.report import page_words as words
from m27quant.report.facts import logits_rows, measured_rows, serving_table
from m27quant.report.measured import Measured, contradictions
from m27quant.report.plots import number
from m27quant.report.recorded import Recorded
from m27quant.report.text import line, plural, size, summary
from m27quant.verify.findings import VerifyResult

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = "m27quant report"
"""Names the page's author in its head; a file that has it may be replaced."""
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
    maps = drawings.maps(page.measured, recorded)
    told = page.result.facts
    logits = told.get("logits") or {}
    text = environment.get_template(
        "report.html.jinja"
    ).render(
        generator=GENERATOR,
        version=m27quant.__version__,
        result=page.result,
        name=Path(page.result.checkpoint).name or page.result.checkpoint,
        verdict=words.verdict(page.result),
        counts=summary(page.result) + (f", {page.accepted:,} accepted" if page.accepted else ""),
        facts=words.facts(page.result, recorded),
        made=words.made(recorded),
        recorded=recorded,
        unrecorded=unrecorded,
        contradictions=contradictions(recorded, page.measured) if recorded else 0,
        tiles=words.tiles(page.result, page.measured, recorded),
        sizes=words.sizes(page.measured, recorded),
        logits=logits_rows(logits) if logits else [],
        source=measured_rows(told.get("source") or {}),
        serving=serving_table(told),
        charts=drawings.charts(page.measured, recorded, logits.get("layer_sqnr_db") or ()),
        maps=maps,
        cells=Markup(drawings.cells(maps)),  # numbers and our own words, without < > &
        coverage=words.coverage(recorded),
        worst=words.worst(recorded),
        notices=[*recorded.notices[:MAX_NOTICES]] if recorded else [],
        groups=words.groups(page.result.findings),
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
