"""The pages of the checks: docs/checks.md for all of them, a few lines of text for one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m27quant.verify.findings import Check

ENGINES = ("transformers", "vllm", "sglang")

HEADER = """\
# Checks

Written by `make docs` from the program itself; a test compares the two. `m27quant explain CODE` prints one of
these pages, `m27quant verify CHECKPOINT` looks for all of them. A code never changes its meaning.

An **error** makes the checkpoint unfit for an engine that it concerns; a **warning** is suspect, or costs quality or
memory; a **note** is good to know. `--select` and `--ignore` take whole codes or their beginnings (`M27-S` is every
check of scales), `--fail-on warning` counts warnings as failures, `--baseline` accepts what is known.
"""


def book(checks: Iterable[Check]) -> str:
    """All of docs/checks.md: a table of all codes by family, what engines do, then a section for each."""
    by_family: dict[str, list[Check]] = {}
    for check in checks:
        by_family.setdefault(check.family, []).append(check)
    parts = [HEADER]
    for family, group in by_family.items():
        parts.append(f"\n## {family.capitalize()}\n\n{_table(group)}")
        parts += [_section(check) for check in group]
    return "".join(parts)


def page(check: Check) -> str:
    """One check as text for a terminal."""
    rows = [
        f"{check.code} {check.severity.value}: {check.title}",
        "",
        check.meaning,
        "",
        *(f"{engine}: {does}" for engine, does in check.engines.items()),
        *([""] if check.engines else []),
        f"next step: {check.mend}",
    ]
    return "\n".join(rows)


def _table(checks: Sequence[Check]) -> str:
    """What each engine does, check by check."""
    rows = [f"| code | severity | what | {' | '.join(ENGINES)} |", f"|---|---|---|{'---|' * len(ENGINES)}"]
    for check in checks:
        does = " | ".join(_cell(check.engines.get(engine, "")) for engine in ENGINES)
        link = f"[{check.code}](#{check.code.lower()})"
        rows.append(f"| {link} | {check.severity.value} | {_cell(check.title)} | {does} |")
    return "\n".join(rows) + "\n"


def _section(check: Check) -> str:
    return (
        f"\n### {check.code}\n\n**{_text(check.title)}** ({check.severity.value})\n\n{_text(check.meaning)}\n\n"
        f"Next step: {_text(check.mend)}\n"
    )


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    """Markdown in which stars and underscores of names stay; code between backticks needs nothing."""
    parts = text.split("`")
    parts[::2] = [part.replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)
