"""Verification results made by hand: clean, of every severity, hostile, many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from m27quant.verify.findings import Check, Finding, Severity, VerifyResult

ERROR = Check(
    code="M27-T001",
    family="inventory",
    severity=Severity.ERROR,
    title="expert tensor missing",
    meaning="The expert cannot be computed.",
    engines={"vllm": "loads without a word", "sglang": "stops"},
    mend="quantize the layer again",
)
WARNING = replace(ERROR, code="M27-S004", family="scales", severity=Severity.WARNING, title="scale far out")
NOTE = replace(ERROR, code="M27-T020", severity=Severity.NOTE, title="attention is F32", engines={})

HOSTILE = "\x1b[2J\x1b]8;;http://x\x07[bold red]&<b>]]>\r\n::error::%0A,\u202e\ud800\x00\ufffe|`@all`[a](b)"
"""ANSI, a terminal's link, Rich's and HTML's markup, CDATA's end, commands, bidi, a lone surrogate, NUL, markdown."""


def finding(check: Check = ERROR, **fields: Any) -> Finding:
    given = {
        "check": check,
        "message": "layer 3 expert 17: w1.weight is missing",
        "file": "model-00003-of-00006.safetensors",
        "tensor": "model.layers.3.block_sparse_moe.experts.17.w1.weight",
        "layer": 3,
        "expert": 17,
        "expected": "U8 [32, 64]",
        "found": "nothing",
    }
    return Finding(**{**given, **fields})


def result(*findings: Finding, **fields: Any) -> VerifyResult:
    given: dict[str, Any] = {
        "checkpoint": "out/m27",
        "level": "default",
        "findings": findings,
        "facts": {"layers": 5, "experts": 8, "size_bytes": 12_345_678},
        "checks_run": ("M27-C001", "M27-T001", "M27-S004", "M27-T020"),
    }
    return VerifyResult(**{**given, **fields})


CLEAN = result()
MIXED = result(
    finding(count=3, examples=("a.w1.weight", "b.w1.weight")),
    finding(WARNING, message="layer 1 expert 2: input_scale 90 times the median", expert=2, file=None),
    finding(NOTE, message="attention is F32", tensor=None, layer=None, expert=None, file="config.json"),
)
EVIL = result(
    *(
        finding(
            replace(check, title=HOSTILE, meaning=HOSTILE, mend=HOSTILE, engines={HOSTILE: HOSTILE}),
            message=HOSTILE,
            file=HOSTILE,
            tensor=HOSTILE,
            expected=HOSTILE,
            found=HOSTILE,
            count=2,
            examples=(HOSTILE,),
        )
        for check in (ERROR, WARNING, NOTE)
    ),
    checkpoint=HOSTILE,
    facts={HOSTILE: [HOSTILE, {"n": float("nan")}]},
)
MANY = result(*(finding(check, layer=n, expert=None) for check in (ERROR, WARNING, NOTE) for n in range(40)))
ALL = {"clean": CLEAN, "mixed": MIXED, "evil": EVIL, "many": MANY}
