"""Which tensors are there."""

from __future__ import annotations

from m27quant.verify.checks.wording import ERROR, REQUANTIZE, WARNING, adder, engines
from m27quant.verify.findings import Check

CHECKS: dict[str, Check] = {}
check = adder(CHECKS)

check(
    "M27-T001", ERROR, "expert tensor missing",
    "One of the four tensors of an expert's matrix (weight, weight_scale, weight_scale_2, input_scale) is not there.",
    REQUANTIZE,
    engines("silently uses uninitialized memory: NaN or garbage, depending on the prompt",
             "input_scale becomes 1.0, others stay uninitialized, silently",
             "random weights, named in the loading report"),
)  # fmt: skip
check(
    "M27-T002", ERROR, "tensor missing", "A tensor that config.json implies is not there.",
    "Fetch the shard again, or quantize again.",
    engines("uninitialized memory, silently", "uninitialized memory, silently", "random weights, with a warning"),
)  # fmt: skip
check(
    "M27-T003", ERROR, "KV scales of a layer missing",
    "Other layers have k_scale and v_scale, this one has neither: its cache is quantized with 1.0.", REQUANTIZE,
    engines("1.0, one warning for all", "1.0, silently"),
)  # fmt: skip
check(
    "M27-T004", ERROR, "one KV scale without the other", "k_scale and v_scale come in pairs.", REQUANTIZE,
    engines("k alone is used for v too; v alone is an AssertionError", "the missing one is 1.0, silently"),
)  # fmt: skip
check(
    "M27-T005", ERROR, "in-memory tensor names",
    "transformers' own names (`mlp.experts.E.gate_proj`, fused `gate_up_proj`) instead of the official "
    "`block_sparse_moe.experts.E.w1`: an export without its reverse mapping.",
    "Rename the tensors, or export again; `m27quant quantize` writes official names.",
    engines('ValueError "There is no module or parameter named ..."', "skips them silently: garbage"),
)  # fmt: skip
check(
    "M27-T006", ERROR, "left-overs of calibration",
    "`_amax` and `*_quantizer` tensors are modelopt's state while it calibrates: this was saved, not exported.",
    "Export with modelopt's export_hf_checkpoint, or quantize with m27quant.",
    engines("ValueError: no such parameter", "skips them silently"),
)  # fmt: skip
check(
    "M27-T007", WARNING, "tensors of layers behind the last one",
    "Multi-token-prediction layers: no engine's MiniMax-M2 runs them, and public M2.x checkpoints have none.",
    "Drop them: they take room only.",
    engines("dropped silently where num_mtp_modules covers them", "skipped silently", "ignored"),
)  # fmt: skip
check(
    "M27-T008", ERROR, "KV scales under an engine's own names",
    "`self_attn.attn.k_scale` is what an engine renames `self_attn.k_proj.k_scale` to.",
    "Store them as self_attn.k_proj.k_scale and self_attn.v_proj.v_scale.",
    engines("not remapped: may load by chance", "becomes `.attn.attn.` and is dropped: 1.0"),
)  # fmt: skip
check(
    "M27-T009", ERROR, "unknown tensor", "Nothing in a MiniMax-M2 checkpoint in NVFP4 has this name.",
    "Remove it, or correct its name.",
    engines("ValueError: no such parameter", "skipped silently", "ignored, named in the loading report"),
)  # fmt: skip
check(
    "M27-T010", ERROR, "config.json disagrees with the tensors",
    "A size in config.json is not the one that the tensors have: these two files are not of one model.",
    "Take config.json from the checkpoint that was quantized.",
    engines("shape error, or experts and layers that stay uninitialized", "as vLLM", "shape error"),
)  # fmt: skip
check(
    "M27-T011", ERROR, "FP8 left-overs",
    "`weight_scale_inv` belongs to the FP8 original; NVFP4 checkpoints have none.",
    "Store attention in BF16, dequantized, and leave the scales out.",
    engines("ValueError: no such parameter", "skipped silently: FP8 codes taken for values"),
)  # fmt: skip
check(
    "M27-T012", ERROR, "labelled NVFP4, but experts are not packed",
    "A fake-quantized upload: config says NVFP4, yet the expert weights are stored in 16 or 8 bits.",
    "Export the checkpoint in earnest, or quantize the original with m27quant.",
    engines("shape or parameter error", "shape error"),
)  # fmt: skip
check(
    "M27-T013", ERROR, "weight-only, but labelled NVFP4",
    "No expert has an input_scale, while config says that activations are quantized: engines use what is not there.",
    "Label it W4A16_NVFP4 with input_activations null, or calibrate and quantize again.",
    engines("uninitialized input_scale: experts become zero or NaN, silently", "input_scale 1.0 everywhere"),
)  # fmt: skip
check(
    "M27-T014", ERROR, "compressed-tensors names",
    "`weight_packed` and `weight_global_scale` are another format, whose global scales are reciprocals.",
    "Label it quant_method compressed-tensors, or convert names and invert the global scales.",
    engines("ValueError: no such parameter", "skipped silently: garbage"),
)  # fmt: skip
