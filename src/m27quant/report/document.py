"""The JSON document of a verification; its schema is docs/schemas/verify.schema.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from m27quant.errors import M27Error
from m27quant.verify.baseline import fingerprints

if TYPE_CHECKING:
    from m27quant.verify.findings import Finding, VerifyResult

SCHEMA_VERSION = 1


def render(result: VerifyResult, *, accepted: int = 0) -> str:
    """ASCII JSON, indented."""
    content = {"schema_version": SCHEMA_VERSION, **document(result, accepted=accepted)}
    return json.dumps(content, indent=2, allow_nan=False)


def document(result: VerifyResult, *, accepted: int = 0) -> dict[str, Any]:
    """The document without its `schema_version`.  Names are as in the checkpoint, but always valid Unicode.

    `accepted` findings were left out, as a baseline names them.
    """
    marks = fingerprints(result.findings)
    content = {
        "checkpoint": result.checkpoint,
        "level": result.level,
        "ok": result.ok,
        "summary": {s: sum(f.severity == s for f in result.findings) for s in ("error", "warning", "note")},
        "facts": result.facts,
        "checks_run": result.checks_run,
        "accepted": accepted,
        "error": _fault(result.fault),
        "findings": [_finding(f, mark) for f, mark in zip(result.findings, marks, strict=True)],
    }
    found: dict[str, Any] = plain(content)
    return found


def _fault(fault: M27Error | None) -> dict[str, Any] | None:
    """Why the verification came to no end, as commands say it on stderr."""
    if fault is None:
        return None
    return {"message": fault.message, "hint": fault.hint, "exit_code": fault.exit_code}


def _finding(finding: Finding, mark: str) -> dict[str, Any]:
    check = finding.check
    return {
        "code": check.code,
        "severity": check.severity.value,
        "family": check.family,
        "title": check.title,
        "message": finding.message,
        "file": finding.file,
        "tensor": finding.tensor,
        "layer": finding.layer,
        "expert": finding.expert,
        "expected": finding.expected,
        "found": finding.found,
        "count": finding.count,
        "examples": finding.examples,
        "engines": check.engines,
        "next_step": check.mend,
        "fingerprint": mark,
    }


def plain(value: Any) -> Any:
    """What JSON can hold: no NaN, no lone surrogates, which strict parsers refuse."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode()
