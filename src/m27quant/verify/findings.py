"""What a verification says: checks with stable codes, and the findings that they give.  No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from m27quant.errors import M27Error


class Severity(StrEnum):
    """How bad a finding is; errors make the checkpoint unfit for an engine that it concerns."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that is looked for.  Its code never changes its meaning."""

    code: str
    """M27-T001: a letter for the family, a number within it."""
    family: str
    severity: Severity
    title: str
    """One line, without names: "expert tensor missing"."""
    meaning: str
    """What it is and why it matters."""
    engines: dict[str, str]
    """What each engine does with it, without a word or with one: transformers, vllm, sglang."""
    mend: str
    """What to do next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check that found something; similar ones are folded into one with a `count`."""

    check: Check
    message: str
    """One line that names tensor, layer and expert, with expected and found.  Hostile text is escaped in it."""
    file: str | None = None
    tensor: str | None = None
    layer: int | None = None
    expert: int | None = None
    expected: str | None = None
    found: str | None = None
    count: int = 1
    """How many tensors or places this finding stands for."""
    examples: tuple[str, ...] = ()
    """Further names, where it stands for several."""

    @property
    def severity(self) -> Severity:
        """The check's."""
        return self.check.severity


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """A finished verification."""

    checkpoint: str
    level: str
    findings: tuple[Finding, ...]
    """Aggregated, errors first, the gravest families first."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the checkpoint is: layers, experts, formats, sizes."""
    checks_run: tuple[str, ...] = ()
    """Codes of all checks that were applied."""
    fault: M27Error | None = None
    """What ended the verification before it could say anything; the one finding tells it."""

    def count(self, severity: Severity) -> int:
        """How many findings have this severity."""
        return sum(f.severity is severity for f in self.findings)

    @property
    def ok(self) -> bool:
        """No error."""
        return not self.count(Severity.ERROR)


def select(
    findings: Iterable[Finding], *, only: Iterable[str] = (), ignore: Iterable[str] = ()
) -> list[Finding]:
    """Keep findings whose code begins with one of `only` (all, where it is empty) and with none of `ignore`."""
    chosen, dropped = tuple(only), tuple(ignore)
    return [
        f
        for f in findings
        if (not chosen or f.check.code.startswith(chosen))
        and not (dropped and f.check.code.startswith(dropped))
    ]
