"""Scales of weights, inputs, keys and values."""

from __future__ import annotations

from m27quant.verify.checks.wording import AS_IS, ERROR, GARBAGE, NOTE, REQUANTIZE, WARNING, adder, engines
from m27quant.verify.findings import Check

CHECKS: dict[str, Check] = {}
check = adder(CHECKS)

check(
    "M27-S001", ERROR, "scale is NaN or infinite", "All that it multiplies is NaN or infinite.",
    REQUANTIZE, engines("NaN logits", "NaN logits", "NaN logits"),
)  # fmt: skip
check(
    "M27-S002", ERROR, "scale is zero", "Zero removes the weight; a zero input_scale is divided by: Inf, then NaN.",
    REQUANTIZE, engines("1/0, then NaN, depending on the prompt", "as vLLM", "zero weights"),
)  # fmt: skip
check(
    "M27-S003", ERROR, "scale is negative", "A scale is a magnitude; a negative one flips every sign.",
    REQUANTIZE, engines("used as it is", "used as it is", "used as it is"),
)  # fmt: skip
check(
    "M27-S004", ERROR, "w1 and w3 differ in weight_scale_2",
    "Engines fuse w1 and w3 and take w1's scale for both: the up half is scaled wrongly.",
    "Quantize w1 and w3 of an expert with one global scale, as m27quant does.",
    engines("warns once, then uses w1's for both", "TRT-LLM kernels keep both, others use w1's"),
)  # fmt: skip
check(
    "M27-S005", ERROR, "w1 and w3 differ in input_scale",
    "Both matrices see the same activations, so their scales must be one number.", REQUANTIZE,
    engines("uses the larger one", "uses the larger one"),
)  # fmt: skip
check(
    "M27-S006", WARNING, "expert was never calibrated",
    "input_scale is 1.8601190e-4, modelopt's fallback for an expert that saw no token: it saturates real inputs.",
    REQUANTIZE,
    engines("hidden by the layer's maximum, except VLLM_CUTLASS: expert saturates", "as vLLM; CUTEDSL uses it for w2"),
)  # fmt: skip
check(
    "M27-S007", WARNING, "scale is the default 1.0",
    "Exactly 1.0 is what is written where nothing was measured.", REQUANTIZE,
    engines("dominates the layer's maximum; small activations underflow", "as vLLM"),
)  # fmt: skip
check(
    "M27-S008", ERROR, "weight_scale_2 is 1/6",
    "448/2688: the maximum was taken from raw FP8 codes, without their block scales.",
    "Quantize from the dequantized weights (m27quant does; modelopt 0.47 on FP8 modules does not).",
    engines("uses it: garbage", "uses it: garbage", "uses it: garbage"),
)  # fmt: skip
check(
    "M27-S009", WARNING, "input_scale far below its layer's median",
    "Less than 1/16 of the median of the layer's experts: an expert that saw too few tokens saturates.",
    REQUANTIZE, engines("hidden by the layer's maximum, except VLLM_CUTLASS", "CUTEDSL uses it for w2"),
)  # fmt: skip
check(
    "M27-S010", WARNING, "scale far above its layer's median",
    "More than 64 times the median: an outlier in calibration, or a damaged number.",
    "Look at the calibration text, or at the weights of this expert.",
    engines("raises the layer's maximum for all experts", "as vLLM"),
)  # fmt: skip
check(
    "M27-S011", WARNING, "weight_scale_2 far below its layer's median",
    "Less than 1/64 of the median: a matrix of almost nothing, or a damaged number.",
    "Compare the expert with the original.", engines("used as it is", "used as it is"),
)  # fmt: skip
check(
    "M27-S012", ERROR, "block scale is NaN", "Codes 0x7F and 0xFF of E4M3: sixteen weights are NaN.",
    REQUANTIZE, engines("NaN for every token of this expert", "as vLLM", "as vLLM"),
)  # fmt: skip
check(
    "M27-S013", ERROR, "block scale is negative", "A block scale is a magnitude: sixteen weights change sign.",
    REQUANTIZE, engines("used as it is, or as its magnitude", "as vLLM", "used as it is"),
)  # fmt: skip
check(
    "M27-S014", ERROR, "block scale is zero under non-zero codes",
    "Sixteen weights that are not zero become zero: the block's scale underflowed E4M3.",
    "Quantize with m27quant or modelopt 0.45 and later, which keep at least 2^-9.",
    engines("zero weights, silently", "zero weights, silently", "zero weights, silently"),
)  # fmt: skip
check(
    "M27-S015", WARNING, "block scales are saturated",
    "More than a tenth of a matrix's block scales is 448: its global scale is too small and blocks are clipped.",
    "Take weight_scale_2 from the matrix's own maximum.", engines("used as it is", "used as it is", "used as it is"),
)  # fmt: skip
check(
    "M27-S016", WARNING, "KV scales are all 1.0",
    "Placeholders: the cache was never calibrated.  Without any KV scales engines use the same 1.0.",
    "Calibrate the cache, or leave the scales out (recipe *-fp8_kv_cast).",
    engines("1.0: keys or values beyond 448 are clipped", "as vLLM"),
)  # fmt: skip
check(
    "M27-S017", NOTE, "FP8 cache without scales",
    "The cast recipe: config asks for an FP8 cache, no scales are stored, engines use 1.0.",
    "Nothing, where this is meant; recipe nvfp4_experts_only-fp8_kv calibrates them.",
    engines("1.0 and one warning", "1.0"),
)  # fmt: skip
check(
    "M27-S018", ERROR, "global scales look like reciprocals",
    "Half of these scales stand for weights beyond 2,688, or inputs beyond 268,800: no model has them. "
    "compressed-tensors stores 2688/amax where modelopt stores amax/2688; with --source, M27-W012 proves it.",
    "Store the reciprocals: weight_scale_2 = amax/2688, input_scale = amax/2688.", GARBAGE,
)  # fmt: skip
check(
    "M27-S019", WARNING, "KV scale far from the other layers'",
    "A scale 64 times below the median of all layers saturates the cache, one 64 times above leaves it few values.",
    "Calibrate the KV cache again.", AS_IS,
)  # fmt: skip

check(
    "M27-S020", WARNING, "block scales look swizzled",
    "Rows and columns of a trained matrix differ in size. Here the block scales, read in order, hide that, and read as "
    "a kernel's 128x4 tiles they show it. Matrices without such rows and columns, or that fill no tiles, are not "
    "judged; with --source, M27-W011 proves it.",
    "Store block scales row by row; engines swizzle them on load.", GARBAGE,
)  # fmt: skip

check(
    "M27-S021", ERROR, "weights that no model has",
    "6 times the largest block scale times weight_scale_2 is beyond 1,000, which no trained weight comes near: a "
    "global scale of 1.0 that nobody computed, or a damaged number.",
    "Take weight_scale_2 from the source's maximum divided by 2688.", GARBAGE,
)  # fmt: skip
