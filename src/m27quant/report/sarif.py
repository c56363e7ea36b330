"""SARIF 2.1.0, for GitHub code scanning and every viewer of static analysis.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import m27quant
from m27quant.errors import M27Error
from m27quant.report.text import engines, line, location, paragraph
from m27quant.verify.baseline import fingerprints

if TYPE_CHECKING:
    from m27quant.verify.findings import Check, Finding, VerifyResult

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
MAX_RESULTS = 5000
"""What GitHub shows of one run; it refuses more than 25,000."""


def render(result: VerifyResult) -> str:
    """One run: the checks that found something as rules, their findings as results."""
    rules = list({f.check.code: f.check for f in result.findings}.values())
    index = {check.code: i for i, check in enumerate(rules)}
    shown = result.findings[:MAX_RESULTS]
    marks = fingerprints(shown)
    driver = {
        "name": "m27quant",
        "semanticVersion": m27quant.__version__,
        "rules": [_rule(check) for check in rules],
    }
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": f"m27quant/verify/{line(result.level)}/"},
        "invocations": [_invocation(len(result.findings) - len(shown), result.fault)],
        "columnKind": "unicodeCodePoints",
        "results": [
            _result(result, f, index[f.check.code], mark) for f, mark in zip(shown, marks, strict=True)
        ],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, allow_nan=False)


def _rule(check: Check) -> dict[str, Any]:
    parts = [line(check.meaning), engines(check), f"Next step: {line(check.mend)}"]
    return {
        "id": line(check.code),
        "shortDescription": {"text": line(check.title)},
        "fullDescription": {"text": line(check.meaning)},
        "help": {"text": "\n\n".join(part for part in parts if part)},
        "defaultConfiguration": {"level": check.severity.value},
        "properties": {"tags": [line(check.family)]},
    }


def _invocation(left_out: int, fault: M27Error | None) -> dict[str, Any]:
    """`executionSuccessful` is about the tool: findings are no failure of it, an unreadable checkpoint is."""
    invocation: dict[str, Any] = {"executionSuccessful": fault is None}
    if fault is not None:
        invocation["exitCode"] = fault.exit_code
        invocation["toolExecutionNotifications"] = [
            {"level": "error", "message": {"text": line(fault.message).replace("](", "] (")}}
        ]
    if left_out:
        text = f"{left_out:,} more findings are left out: a run shows {MAX_RESULTS:,}"
        invocation["toolExecutionNotifications"] = [{"level": "warning", "message": {"text": text}}]
    return invocation


def _result(result: VerifyResult, finding: Finding, rule: int, mark: str) -> dict[str, Any]:
    place: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": _uri(location(result, finding))},
            "region": {"startLine": 1},  # a binary file has no lines; GitHub asks for one
        }
    }
    if finding.tensor is not None:
        place["logicalLocations"] = [{"fullyQualifiedName": line(finding.tensor), "kind": "member"}]
    properties = {
        "layer": finding.layer,
        "expert": finding.expert,
        "examples": [line(name) for name in finding.examples] or None,
    }
    return {
        "ruleId": line(finding.check.code),
        "ruleIndex": rule,
        "level": finding.severity.value,
        # Viewers make a link of [text](target), which a checkpoint has no business to place.
        "message": {"text": paragraph(finding).replace("](", "] (")},
        "locations": [place],
        "occurrenceCount": finding.count,
        "partialFingerprints": {"m27quant/v1": mark},
        "properties": {key: value for key, value in properties.items() if value is not None},
    }


def _uri(path: str) -> str:
    """A relative reference, which a colon in its first segment must not turn into a scheme."""
    return ("file://" if path.startswith("/") else "") + quote(path)
