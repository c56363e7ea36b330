"""What every rendering of a verification says in words: one safe line for each thing."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from m27quant.errors import escape

if TYPE_CHECKING:
    from m27quant.verify.findings import Check, Finding, VerifyResult

MAX_LINE = 2000
ANCHOR = "config.json"
"""The file that stands for the checkpoint where a finding is about none: CI systems refuse findings without one."""


def line(text: object) -> str:
    """Text as one line without control characters, lone surrogates or other invisible ones."""
    return escape(text, MAX_LINE)


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 error", "1,200 places"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(num_bytes: int) -> str:
    """Decimal, as disks and the Hub state it: "134.5 GB"."""
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= power:
            digits = ",.4g" if num_bytes < 1000 * power else ",.0f"
            return f"{num_bytes / power:{digits}} {unit}"
    return f"{num_bytes} B"


def summary(result: VerifyResult) -> str:
    """All counts: "2 errors, 1 warning", or "no findings"."""
    counts = {s: sum(f.severity == s for f in result.findings) for s in ("error", "warning", "note")}
    return ", ".join(plural(n, severity) for severity, n in counts.items() if n) or "no findings"


def others(finding: Finding) -> str | None:
    """The further places of a finding that stands for several."""
    rest = finding.count - 1
    if rest < 1:
        return None
    if not finding.examples:
        return plural(rest, "more place")
    shown = ", ".join(line(name) for name in finding.examples)
    return f"{rest:,} more: {shown}" + (" ..." if rest > len(finding.examples) else "")


def engines(check: Check) -> str:
    """What each engine does with it, in one line."""
    return "; ".join(f"{line(name)}: {line(does)}" for name, does in check.engines.items())


def details(finding: Finding) -> list[tuple[str, str]]:
    """What stands below a finding's message, each with its label; the next step is last."""
    rows = [
        ("expected", finding.expected),
        ("found", finding.found),
        ("also", others(finding)),
        ("engines", engines(finding.check) or None),
        ("next step", finding.check.mend),
    ]
    return [(label, line(text)) for label, text in rows if text is not None]


def paragraph(finding: Finding) -> str:
    """Message and details as lines of plain text."""
    return "\n".join([line(finding.message), *(f"{label}: {text}" for label, text in details(finding))])


def location(result: VerifyResult, finding: Finding) -> str:
    """The file that a finding is shown at, below the folder that was verified, with `/`.

    A name that would leave the folder is not followed: the finding is then about the checkpoint as such.
    """
    name = finding.file or ANCHOR
    windows = PureWindowsPath(name)
    if windows.name != name or windows.drive or name == "..":
        name = ANCHOR
    return line(PurePosixPath(result.checkpoint.replace("\\", "/")) / name)
