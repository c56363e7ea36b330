"""Answers against the source's: with --logits."""

from __future__ import annotations

from m27quant.verify.checks.wording import ERROR, WARNING, adder, engines
from m27quant.verify.findings import Check

CHECKS: dict[str, Check] = {}
check = adder(CHECKS)

_ALONE = "`m27quant verify CHECKPOINT --full --source MODEL` names the matrix; quantize again."
check(
    "M27-L001", ERROR, "logits are NaN or infinite", "Some token of the text gets no probabilities.",
    "Mend what other checks find; overflow without a finding comes from scales that are far too large.",
    engines("NaN logits, or `!` for ever", "NaN logits, or `!` for ever", "NaN logits"),
)  # fmt: skip
check(
    "M27-L002", ERROR, "perplexity is too high",
    "Over its source's on the text, the ratio is above 1.05; tiny-m27, which has little to spare, measures 1.02.",
    _ALONE,
)  # fmt: skip
check(
    "M27-L003", ERROR, "distributions are too far apart",
    "The mean KL divergence from the source's next-token probabilities is above 0.05 nats; tiny-m27 measures 0.013.",
    _ALONE,
)  # fmt: skip
check(
    "M27-L004", WARNING, "too many likeliest tokens differ",
    "Checkpoint and source agree on fewer than 85% of the likeliest next tokens; tiny-m27 measures 92%.", _ALONE,
)  # fmt: skip
check(
    "M27-L005", ERROR, "expert is not the source's",
    "On the source's own tokens for this expert its output has an SQNR below 10 dB; sound ones of tiny-m27 have 12 to "
    "18. A halved scale leaves 6 or less.",
    _ALONE, engines("used as it is", "used as it is", "used as it is"),
)  # fmt: skip
