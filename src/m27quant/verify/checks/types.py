"""Dtypes and shapes."""

from __future__ import annotations

from m27quant.verify.checks.wording import ERROR, NOTE, REQUANTIZE, WARNING, adder, engines
from m27quant.verify.findings import Check

CHECKS: dict[str, Check] = {}
check = adder(CHECKS)

check(
    "M27-D001", ERROR, "wrong dtype", "The tensor is not stored in the type that engines allocate for it.",
    REQUANTIZE, engines("cast by value, silently: codes taken for numbers", "as vLLM", "cast by value"),
)  # fmt: skip
check(
    "M27-D002", ERROR, "wrong shape", "The tensor's shape is not the one that config.json implies.",
    REQUANTIZE, engines("shape error on load", "shape error on load", "shape error on load"),
)  # fmt: skip
check(
    "M27-D003", WARNING, "router is not F32",
    "Gate or e_score_correction_bias in less than F32: rounding changes which experts a token goes to.",
    "Copy both byte for byte from the original.",
    engines("computes the gate in F32 of what is stored", "as vLLM", "casts the bias to BF16 itself"),
)  # fmt: skip
check(
    "M27-D004", NOTE, "attention in F32", "Twice the bytes of BF16 and not a bit more information.",
    "Store it in BF16: 5.5 GB less for M2.7.",
    engines("casts to BF16 on load", "casts to BF16 on load", "casts on load"),
)  # fmt: skip
check(
    "M27-D005", ERROR, "scale has the wrong rank", "A global scale, input scale or KV scale is one number.",
    REQUANTIZE, engines("ValueError, or the first number is taken", "as vLLM"),
)  # fmt: skip
check(
    "M27-D006", WARNING, "scale is a list of one number", "Shape [1] where modelopt and engines write [].",
    "Store it with shape [].", engines("accepted", "accepted"),
)  # fmt: skip
check(
    "M27-D007", ERROR, "block scales are padded or swizzled",
    "weight_scale has the shape of one kernel's layout; checkpoints store it linear, engines swizzle on load.",
    "Store it as [out, in/16], row by row.", engines("shape error on load", "shape error on load"),
)  # fmt: skip
check(
    "M27-D008", ERROR, "KV scale in the wrong dtype", "k_scale and v_scale are F32.",
    REQUANTIZE, engines("cast by value, with the rounding that it had", "as vLLM"),
)  # fmt: skip
