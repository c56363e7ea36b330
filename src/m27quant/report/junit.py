"""JUnit XML: one test case per check, for GitLab, Jenkins, Azure, CircleCI and GitHub's report actions."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import TYPE_CHECKING

from m27quant.report.text import line, location, paragraph
from m27quant.verify.checks import CHECKS

if TYPE_CHECKING:
    from m27quant.verify.findings import Finding, VerifyResult


def render(result: VerifyResult, *, fail_on: str = "error") -> str:
    """Checks with findings of severity `fail_on` or worse are failures; milder ones are the case's output."""
    by_code: dict[str, list[Finding]] = {code: [] for code in result.checks_run}
    for finding in result.findings:
        by_code.setdefault(finding.check.code, []).append(finding)
    failing = {"error"} if fail_on == "error" else {"error", "warning"}
    failures = 0
    errors = "1"
    if result.fault is None:
        failures, errors = sum(any(f.severity in failing for f in found) for found in by_code.values()), "0"
    counts = {"tests": str(len(by_code)), "failures": str(failures), "errors": errors, "skipped": "0"}
    root = ET.Element("testsuites", {"name": "m27quant verify", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": line(result.checkpoint), **counts})
    for code, found in by_code.items():
        _case(suite, result, code, found, failing)
    ET.indent(root)
    # Through bytes, as the declaration of a text would name this machine's locale.
    data: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return data.decode()


def _case(
    suite: ET.Element, result: VerifyResult, code: str, found: Sequence[Finding], failing: set[str]
) -> None:
    check = found[0].check if found else CHECKS.get(code)
    name = f"{line(code)} {line(check.title)}" if check else line(code)
    family = line(check.family) if check else "verify"
    case = ET.SubElement(suite, "testcase", {"classname": f"m27quant.{family}", "name": name})
    if not found:
        return
    case.set("file", location(result, found[0]))
    text = "\n\n".join(paragraph(f) for f in found)
    if any(f.severity in failing for f in found):
        attributes = {"message": line(found[0].message), "type": found[0].severity.value}
        # an error is a test that could not be done, a failure one that was
        kind = "failure" if result.fault is None else "error"
        ET.SubElement(case, kind, attributes).text = text
    else:
        ET.SubElement(case, "system-out").text = text
