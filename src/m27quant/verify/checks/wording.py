"""How a check is written down, and words that many of them share."""

from __future__ import annotations

from collections.abc import Callable

from m27quant.verify.findings import Check, Severity

FAMILIES = {
    "C": "container",
    "T": "inventory",
    "D": "types",
    "S": "scales",
    "W": "weights",
    "F": "configs",
    "E": "engines",
    "V": "serving",
    "R": "drafter",
    "L": "logits",
    "O": "outputs",
}
"""Letter of a code -> family, the gravest first."""

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

LOADERS = {"transformers": "SafetensorError on load", "vllm": "SafetensorError on load", "sglang": "as vLLM"}
AGAIN = "Download the file again; `hf cache verify` compares it with the Hub."
REINDEX = "Write the index again from the shards' headers, or fetch index and shards of one revision."
REQUANTIZE = "Quantize again, with every expert calibrated."
CONFIG = "Correct the field; `m27quant quantize` writes it right."


def adder(checks: dict[str, Check]) -> Callable[..., None]:
    """A function that adds a check to its family, by code."""

    def check(
        code: str,
        severity: Severity,
        title: str,
        meaning: str,
        mend: str,
        engines: dict[str, str] | None = None,
    ) -> None:
        family = FAMILIES[code[4]]
        checks[code] = Check(
            code=code,
            family=family,
            severity=severity,
            title=title,
            meaning=meaning,
            engines=engines or {},
            mend=mend,
        )

    return check


def engines(vllm: str = "", sglang: str = "", transformers: str = "") -> dict[str, str]:
    """What each does; nothing of those that do as they should."""
    table = {"transformers": transformers, "vllm": vllm, "sglang": sglang}
    return {engine: what for engine, what in table.items() if what}


GARBAGE = engines("garbage, silently", "garbage, silently", "garbage, silently")
AS_IS = engines("used as it is", "used as it is", "used as it is")
