"""A verification that came to no end, as a result: so that a report file says so instead of saying nothing."""

from __future__ import annotations

import dataclasses

from m27quant.errors import M27Error, escape
from m27quant.verify.checks import CHECKS
from m27quant.verify.findings import Finding, VerifyResult

CODE = "M27-C023"


def unverified(checkpoint: str, level: str, fault: M27Error) -> VerifyResult:
    """A result that holds nothing but the fault, as an error."""
    check = CHECKS[CODE]
    if fault.hint:
        check = dataclasses.replace(check, mend=escape(fault.hint))
    return VerifyResult(
        checkpoint=escape(checkpoint, 4096),
        level=level,
        findings=(Finding(check=check, message=escape(fault.message, 1000)),),
        checks_run=(CODE,),
        fault=fault,
    )
