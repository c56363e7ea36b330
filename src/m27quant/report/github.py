"""GitHub Actions: workflow commands that become annotations, and the markdown of the job's summary.

Runners keep 10 annotations of a type per step and drop the rest without a word, so the rest is folded into one.
https://docs.github.com/actions/reference/workflow-commands-for-github-actions
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from m27quant.report.text import line, location, paragraph, plural, summary

if TYPE_CHECKING:
    from m27quant.verify.findings import Finding, VerifyResult

COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}
MAX_ANNOTATIONS = 10
MAX_SUMMARY_BYTES = 2**20
"""A larger summary is refused as a whole; other steps' share of a job is not ours to count."""

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")


def render(result: VerifyResult) -> str:
    """Annotations, at most 10 of a type, then one plain line."""
    rows = []
    for severity, command in COMMANDS.items():
        found = [f for f in result.findings if f.severity == severity]
        whole = found if len(found) <= MAX_ANNOTATIONS else found[: MAX_ANNOTATIONS - 1]
        rows += [
            _command(
                command,
                paragraph(f),
                file=location(result, f),
                title=f"{line(f.check.code)} {line(f.check.title)}",
            )
            for f in whole
        ]
        if rest := found[len(whole) :]:
            codes = Counter(line(f.check.code) for f in rest)
            listed = ", ".join(f"{code} ({n})" for code, n in codes.most_common(20))
            rows.append(_command(command, listed, title=f"and {plural(len(rest), severity)} more"))
    return "\n".join([*rows, f"m27quant verify: {summary(result)}"])


def step_summary(result: VerifyResult) -> str:
    """Markdown for $GITHUB_STEP_SUMMARY, below its limit of 1 MiB."""
    verdict = "passed" if result.ok else "failed"
    head = (
        f"### m27quant verify: {verdict}\n\n{markdown(result.checkpoint)}: {summary(result)} "
        f"in {plural(len(result.checks_run), 'check')} (level {markdown(result.level)})\n"
    )
    if not result.findings:
        return head
    head += "\n| | code | what | places | next step |\n|---|---|---|---:|---|\n"
    return head + _fitting(result.findings, MAX_SUMMARY_BYTES // 2 - len(head.encode()))


def markdown(text: object) -> str:
    """Text that renders as itself: no markup, link, mention or HTML."""
    return _PUNCTUATION.sub(r"\\\1", line(text))


def _fitting(findings: Sequence[Finding], room: int) -> str:
    rows: list[str] = []
    for at, finding in enumerate(findings):
        row = _row(finding)
        room -= len(row.encode())
        if room < 0:
            return "".join([*rows, f"\n{plural(len(findings) - at, 'finding')} more\n"])
        rows.append(row)
    return "".join(rows)


def _row(finding: Finding) -> str:
    check = finding.check
    cells = (check.severity.value, check.code, finding.message, f"{finding.count:,}", check.mend)
    return f"| {' | '.join(markdown(cell) for cell in cells)} |\n"


def _command(command: str, message: str, **properties: str) -> str:
    """`::error file=...,title=...::message` with everything escaped that would end a part of it."""
    shown = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::{command} {shown}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
