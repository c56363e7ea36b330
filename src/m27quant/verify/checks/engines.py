"""What an engine would do with it."""

from __future__ import annotations

from m27quant.verify.checks.wording import CONFIG, ERROR, WARNING, adder, engines
from m27quant.verify.findings import Check

CHECKS: dict[str, Check] = {}
check = adder(CHECKS)

check(
    "M27-E001", ERROR, "exclude list covers experts",
    "By the engine's own matching the list takes NVFP4 experts out of quantization "
    "(vLLM sees `mlp.experts`, SGLang `block_sparse_moe.experts`).",
    "Use model.layers.N.self_attn*, model.layers.N.block_sparse_moe.gate for every layer, and lm_head.",
    engines("AttributeError: no parameter 'w13_weight_scale'", "experts stay uninitialized, silently"),
)  # fmt: skip
check(
    "M27-E002", ERROR, "attention is not excluded",
    "By the engine's own matching it expects NVFP4 where the checkpoint holds BF16.",
    "Exclude model.layers.N.self_attn* for every layer.",
    engines("shape error on load", "shape error on load"),
)  # fmt: skip
check(
    "M27-E003", ERROR, "lm_head is not excluded", "vLLM quantizes the head unless it is excluded.",
    'Add "lm_head" to the exclude lists.', engines("shape error on load"),
)  # fmt: skip
check(
    "M27-E004", ERROR, "q, k and v are excluded only in part", "Engines fuse the three and want one answer for all.",
    "Exclude model.layers.N.self_attn* for every layer.",
    engines('ValueError "Detected some but not all shards of ... are quantized"', "as vLLM"),
)  # fmt: skip
check(
    "M27-E005", WARNING, "regular expression in the exclude list",
    "`re:` is compressed-tensors' notation; modelopt's readers do not know it.", "Write globs or names.",
    engines("never matches", "never matches"),
)  # fmt: skip
check(
    "M27-E006", ERROR, "exclude list is not usable", "It is no list of module names, or far longer than the model.",
    CONFIG, engines("error on load", "error on load"),
)  # fmt: skip
