"""For people: the facts, a table of what was found, then each finding with its next step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from m27quant.report.text import details, line, plural, summary

if TYPE_CHECKING:
    from m27quant.verify.findings import Finding, VerifyResult

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def render(result: VerifyResult) -> str:
    """The text without colour."""
    return styled(result).plain


def styled(result: VerifyResult) -> Text:
    """The text as a terminal shows it."""
    facts = {"checkpoint": result.checkpoint, "level": result.level, **_facts(result.facts)}
    text = Text.assemble(*_columns(facts.items()))
    if result.findings:
        text.append_text(_table(result.findings))
        for _, group in groupby(result.findings, key=lambda f: f.check.code):
            text.append_text(_group(list(group)))
    text.append("\n")
    return text.append_text(verdict(result))


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


def _facts(facts: Mapping[str, object]) -> dict[str, str]:
    """Keys as words: `num_shards` is "shards"."""
    return {
        key.removeprefix("num_").replace("_", " "): _value(value)
        for key, value in facts.items()
        if value is not None
    }


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        shown = {key: item for key, item in value.items() if not _is_table(item)}
        return "; ".join(f"{key} {_value(item)}" for key, item in shown.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return str(value)


def _is_table(value: object) -> bool:
    """Rows that only --json shows, such as a layer's figures."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _columns(pairs: Iterable[tuple[str, str]], indent: str = "") -> list[str | tuple[str, str]]:
    rows = [(line(name), line(value)) for name, value in pairs]
    width = max((len(name) for name, _ in rows), default=0)
    parts: list[str | tuple[str, str]] = []
    for name, value in rows:
        parts += [indent, (f"{name:<{width}}", "bold" if not indent else "dim"), f"  {value}\n"]
    return parts


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
        text.append_text(Text.assemble(*_columns(rest, "    ")))
    return text.append_text(
        Text.assemble(*_columns([row for row in details(findings[0]) if row[0] in shared], "  "))
    )
