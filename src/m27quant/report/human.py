"""For people: the facts, a table of what was found, then each finding with its next step."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from m27quant.report.facts import blocks, columns, flat
from m27quant.report.text import details, line, plural, summary

if TYPE_CHECKING:
    from m27quant.verify.findings import Finding, VerifyResult

MIN_WIDTH = 20
"""Columns that text has in the narrowest terminal."""
_LABEL = re.compile(r" *\S+(?: \S+){0,3} {2,}(?=\S)")
"""A name and the gap before its value."""
STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def render(result: VerifyResult) -> str:
    """The text without colour."""
    return styled(result).plain


def styled(result: VerifyResult, width: int | None = None) -> Text:
    """The text as a terminal of `width` columns shows it; lines as long as they are where it is None."""
    text = columns([("checkpoint", result.checkpoint), ("level", result.level), *flat(result.facts)])
    text.append_text(blocks(result.facts))
    if result.findings:
        text.append_text(_table(result.findings))
        for _, group in groupby(result.findings, key=lambda f: f.check.code):
            text.append_text(_group(list(group)))
    text.append("\n")
    text.append_text(verdict(result))
    return text if width is None else _wrapped(text, width)


def verdict(result: VerifyResult) -> Text:
    """The last line: whether it passed, what was found, by how many checks."""
    style = (
        "bold red"
        if not result.ok
        else "yellow"
        if any(f.severity == "warning" for f in result.findings)
        else "bold green"
    )
    word = "passed" if result.ok else "failed"
    return Text.assemble((word, style), f": {summary(result)} in {plural(len(result.checks_run), 'check')}")


def concise(result: VerifyResult) -> str | None:
    """One line per finding, nothing where there is none."""
    rows = (f"{f.severity} {line(f.check.code)} {line(f.message)}" for f in result.findings)
    return "\n".join(rows) or None


def _table(findings: Sequence[Finding]) -> Text:
    """One row per code: severity, code, places, title."""
    text = Text("\n")
    rows: dict[str, tuple[Finding, int]] = {}
    for finding in findings:
        first, count = rows.get(finding.check.code, (finding, 0))
        rows[finding.check.code] = (first, count + finding.count)
    codes = max(4, *(len(line(code)) for code in rows))
    text.append(f"{'severity':<8}  {'code':<{codes}}  {'places':>7}  what\n", style="bold")
    for code, (finding, count) in rows.items():
        text.append(f"{finding.severity.value:<8}", style=STYLES[finding.severity])
        text.append(f"  {line(code):<{codes}}  {count:>7,}  {line(finding.check.title)}\n")
    return text


def _group(findings: Sequence[Finding]) -> Text:
    """All findings of one check; what is the same for all of them is said once, below the last."""
    check = findings[0].check
    text = Text.assemble("\n", (check.severity.value, STYLES[check.severity]), f" {line(check.code)} ")
    text.append(f"{line(check.title)}\n", style="bold")
    shared = ("engines", "next step")
    for finding in findings:
        text.append(f"  {line(finding.message)}\n")
        rest = [row for row in details(finding) if row[0] not in shared]
        text.append_text(columns(rest, "    "))
    return text.append_text(columns([row for row in details(findings[0]) if row[0] in shared], "  "))


def _wrapped(text: Text, width: int) -> Text:
    """Lines broken at spaces and continued below where their value begins; names of tensors stay whole."""
    return Text("\n").join(part for row in text.split("\n") for part in _broken(row, width))


def _broken(row: Text, width: int) -> list[Text]:
    if len(row) <= width:
        return [row]
    label = _LABEL.match(row.plain)
    indent = label.end() if label and label.end() <= width // 2 else 4
    pieces = textwrap.wrap(
        row.plain[indent:], max(MIN_WIDTH, width - indent), break_long_words=False, break_on_hyphens=False
    )
    parts: list[Text] = []
    end = indent
    for piece in pieces:
        begin = row.plain.index(piece, end)
        end = begin + len(piece)
        parts.append(Text(" " * indent).append_text(row[begin:end]) if parts else row[:end])
    return parts or [row]
