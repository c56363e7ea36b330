"""Findings that were accepted once: written to a file, and from then on only what is new is reported."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.verify.findings import Finding

SCHEMA_VERSION = 1
REWRITE = "write it anew with --write-baseline"


def fingerprint(finding: Finding) -> str:
    """32 hex digits that stay the same as long as the same thing is wrong in the same place.

    The message is left out: its wording may change between versions.
    """
    parts = (
        finding.check.code,
        finding.file,
        finding.tensor,
        finding.layer,
        finding.expert,
        finding.expected,
        finding.found,
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def fingerprints(findings: Iterable[Finding]) -> list[str]:
    """One per finding, each only once: a second one of the same place gets a number."""
    seen: Counter[str] = Counter()
    result = []
    for finding in findings:
        mark = fingerprint(finding)
        seen[mark] += 1
        result.append(mark if seen[mark] == 1 else f"{mark}-{seen[mark]}")
    return result


def to_baseline(findings: Iterable[Finding]) -> str:
    """The file's text: one entry per finding, with what a person needs to review it."""
    entries = [
        {"code": f.check.code, "fingerprint": fingerprint(f), "count": f.count, "message": f.message}
        for f in findings
    ]
    return json.dumps({"schema_version": SCHEMA_VERSION, "accepted": entries}, indent=2) + "\n"


def read_baseline(path: Path) -> Counter[str]:
    """How many places of each fingerprint are accepted.

    Raises:
        UsageError: not a baseline of ours.
    """
    try:
        document = read_object(path)
    except CheckpointError as fault:
        raise UsageError(fault.message, hint=REWRITE) from None
    entries = document.get("accepted")
    if document.get("schema_version") != SCHEMA_VERSION or not isinstance(entries, list):
        raise UsageError(f"{escape(path)}: not a baseline of schema_version {SCHEMA_VERSION}", hint=REWRITE)
    accepted: Counter[str] = Counter()
    for entry in entries:
        mark, count = _entry(entry)
        if mark is None:
            raise UsageError(f"{escape(path)}: {escape(entry)} is no accepted finding", hint=REWRITE)
        accepted[mark] += count
    return accepted


def _entry(entry: Any) -> tuple[str | None, int]:
    if not isinstance(entry, dict):
        return None, 0
    mark, count = entry.get("fingerprint"), entry.get("count")
    good = isinstance(mark, str) and isinstance(count, int) and not isinstance(count, bool) and count > 0
    return (mark, count) if good else (None, 0)  # type: ignore[return-value]  # `good` says what they are


def apply_baseline(
    findings: Iterable[Finding], accepted: Counter[str]
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """(new, accepted) findings; one that has grown to more places than were accepted is new as a whole."""
    left = Counter(accepted)
    fresh, known = [], []
    for finding in findings:
        mark = fingerprint(finding)
        if left[mark] >= finding.count:
            left[mark] -= finding.count
            known.append(finding)
        else:
            fresh.append(finding)
    return tuple(fresh), tuple(known)
