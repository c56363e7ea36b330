"""Every single fault is found at the cheapest level that can see it, under its own code, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from m27quant import verify_checkpoint
from m27quant.verify.checks import CHECKS
from m27quant.verify.findings import Finding, Severity, VerifyResult
from tests.faults.order import ORDERS
from tests.faults.outputs import FAULTS as PLAIN
from tests.faults.outputs import Fault
from tests.faults.subtle import SUBTLE

FAULTS = PLAIN | SUBTLE

ON_REQUEST = ("M27-V", "M27-R", "M27-W", "M27-L", "M27-O")
"""What --gpu, --drafter, --full, --logits and --outputs ask for: each has its own test."""
NO_END = "M27-C023"
"""Told by report files alone, where an error ends the run: tests/cli/test_verify_unreadable.py."""
OVERLAP = "M27-C004"
"""Made in a test of its own: a fault of its kind always breaks another tensor's place, too."""


def errors(result: VerifyResult) -> set[str]:
    return {f.check.code for f in result.findings if f.severity is Severity.ERROR}


def names(finding: Finding, text: str) -> bool:
    return any(text in (where or "") for where in (finding.message, finding.tensor, finding.file))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_found_under_its_own_code(folder: Path, fault: Fault) -> None:
    fault.change(folder)
    result = verify_checkpoint(folder, level=fault.level)
    found = [f for f in result.findings if f.check.code == fault.code]
    assert found, [f.message for f in result.findings]
    assert any(names(f, fault.names) for f in found), [f.message for f in found]
    assert errors(result) <= {fault.code}
    assert len(result.findings) < 30
    if fault.level != "quick":
        assert not errors(verify_checkpoint(folder, level="quick"))
    else:
        assert errors(verify_checkpoint(folder)) <= {fault.code}


def test_every_check_is_made_to_find_something() -> None:
    # in test_good.py: a note on a recipe, and one on the official sizes; in test_mixed.py: another format
    good_ones = {"M27-S017", "M27-F027", "M27-F029"}
    on_request = {code for code in CHECKS if code.startswith(ON_REQUEST)}
    made = {f.code for f in FAULTS.values()} - on_request
    of_order = {f.code for f in ORDERS.values()} - on_request  # test_order.py
    assert made | good_ones | of_order | {OVERLAP, NO_END} == set(CHECKS) - on_request


def test_no_fault_hides_another_of_the_same_name() -> None:
    assert not PLAIN.keys() & SUBTLE.keys()


def test_there_are_enough_of_them() -> None:
    assert len(FAULTS) >= 60
