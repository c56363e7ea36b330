"""What it does where it runs: with --outputs."""

from __future__ import annotations

from m27quant.verify.checks.wording import AS_IS, ERROR, GARBAGE, NOTE, REQUANTIZE, WARNING, adder, engines
from m27quant.verify.findings import Check

CHECKS: dict[str, Check] = {}
check = adder(CHECKS)

_RUN_AGAIN = (
    "Mend what the other findings say; if there are none, report it with the output of `m27quant env`."
)

check(
    "M27-O001", ERROR, "kernel differs from the weights",
    "An expert's output as this device computes it has an SQNR below 35 dB against the same product in F64; sound "
    "kernels have more than 40.",
    "Run with M27QUANT_KERNELS=reference to tell kernel from weights, and report it with `m27quant env`.",
)  # fmt: skip
check(
    "M27-O002", ERROR, "activations beyond their calibrated range",
    "What a layer's w2 sees is, in the median of its experts, more than twice as large as in calibration: the scales "
    "of w1 and w3 are too large there, or input_scale is too small.",
    REQUANTIZE, GARBAGE,
)  # fmt: skip
check(
    "M27-O003", ERROR, "expert's output is not the source's",
    "On the same inputs its output has an SQNR below 6 dB against the source's expert; sound ones have 10 to 20. The "
    "factor between them tells a wrong scale.",
    REQUANTIZE, AS_IS,
)  # fmt: skip
check(
    "M27-O004", ERROR, "tokenizer class breaks the tokenizer",
    "Loaded through the class that tokenizer_config.json names, texts become other tokens than tokenizer.json gives, "
    "or do not come back as they were: spaces where none belong, as in `SPEC. md`.",
    "Set tokenizer_class to PreTrainedTokenizerFast, which takes tokenizer.json as it is in transformers 4 and 5.",
    engines("other tokens, silently", "other tokens, silently", "other tokens, silently"),
)  # fmt: skip
check(
    "M27-O005", ERROR, "a prompt got no answer",
    "Logits were NaN or infinite, or the prompt does not fit.", _RUN_AGAIN,
)  # fmt: skip
check(
    "M27-O006", ERROR, "the source passes a smoke test, the checkpoint does not",
    "Prose, a tool call that parses, closed thoughts: the source's own answer has it, the checkpoint's does not.",
    _RUN_AGAIN,
)  # fmt: skip
check(
    "M27-O007", NOTE, "smoke test not passed",
    "An answer lacks prose, a tool call that parses, or closed thoughts. Without a source that does better it may be "
    "the model's own weakness, or too few tokens.",
    "Give --source to compare, or more --max-tokens.",
)  # fmt: skip
check(
    "M27-O008", ERROR, "texts are sicker than the source's",
    "More spurious spaces, repetition or broken characters than in what the source writes to the same prompts.",
    _RUN_AGAIN,
)  # fmt: skip
check(
    "M27-O009", WARNING, "texts look sick",
    "Many spurious spaces, hardly anything but repetition, or broken characters; there is no source to compare with.",
    "Give --source to compare.",
)  # fmt: skip
check(
    "M27-O010", ERROR, "drafter changes the text",
    "In batch-invariant mode a text with the drafter must be the text without it, token for token.",
    "Report it with the output of `m27quant env`: the fault is in the runtime.",
)  # fmt: skip
check(
    "M27-O011", ERROR, "drafter's taps are shifted",
    "Fed with hidden states one layer up or down, clearly more of its drafts are accepted: its config.json counts "
    "layers otherwise than it was trained.",
    "State the hidden states that it was trained on in its config.json, or run with --drafter-tap-offset.",
    engines("low acceptance, silently", "low acceptance, silently"),
)  # fmt: skip
check(
    "M27-O012", WARNING, "drafter does not pay",
    "Fewer than 1.1 tokens a step: it belongs to another target, or its text is not what it was trained on.",
    "Take a drafter that was trained for this target; `--drafter ngram` costs nothing.",
)  # fmt: skip
check(
    "M27-O013", NOTE, "drafter changes the text by rounding",
    "Outside of batch-invariant mode products of several rows round otherwise than those of one, and near ties fall "
    "differently.",
    "Nothing, or run with --invariant.",
)  # fmt: skip

check(
    "M27-O014", WARNING, "activations use little of their calibrated range",
    "What a layer's w2 sees is less than an eighth of what the other layers' see of their ranges: the scales of w1 and "
    "w3 are too small there, or input_scale is too large.",
    "Compare with --source, which tells a wrong scale from a quiet layer.", AS_IS,
)  # fmt: skip
