"""Every check, as data: what it is called, how bad it is, what each engine does, how to mend it.  One file a family."""

from __future__ import annotations

from m27quant.verify.checks import (
    configs,
    container,
    drafter,
    engines,
    inventory,
    logits,
    outputs,
    scales,
    serving,
    types,
    weights,
)
from m27quant.verify.checks.wording import FAMILIES
from m27quant.verify.findings import Check

__all__ = ["CHECKS", "FAMILIES"]

_PARTS = (container, inventory, types, scales, weights, configs, engines, serving, logits, outputs, drafter)
CHECKS: dict[str, Check] = {code: check for part in _PARTS for code, check in part.CHECKS.items()}
"""By code."""
