"""GitLab's code quality report: a JSON array of issues.

https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from m27quant.report.text import line, location
from m27quant.verify.baseline import fingerprints

if TYPE_CHECKING:
    from m27quant.verify.findings import VerifyResult

SEVERITIES = {"error": "critical", "warning": "minor", "note": "info"}


def render(result: VerifyResult) -> str:
    """One issue per finding; paths are relative to the repository where the checkpoint's was."""
    issues = [
        {
            "description": f"{line(f.message)} (next step: {line(f.check.mend)})",
            "check_name": line(f.check.code),
            "fingerprint": mark,
            "severity": SEVERITIES[f.severity],
            "location": {"path": location(result, f), "lines": {"begin": 1}},
        }
        for f, mark in zip(result.findings, fingerprints(result.findings), strict=True)
    ]
    return json.dumps(issues, indent=2)
