"""Whether and how it can be served: where --gpu, --tp, --ep or --context ask for it."""

from __future__ import annotations

from m27quant.verify.checks.wording import ERROR, NOTE, WARNING, adder, engines
from m27quant.verify.findings import Check

CHECKS: dict[str, Check] = {}
check = adder(CHECKS)

_OTHER_TP = (
    "Take another size; `m27quant verify CHECKPOINT --gpu GPU` picks the smallest that holds the model."
)
_KNOWN_FAULT = "Pass what the finding names, or take a version in which the fault is mended."

check(
    "M27-V001", ERROR, "model does not divide among so many GPUs",
    "Tensor parallelism cuts query heads, key/value heads and the rows of every expert; blocks of 16 stay whole.",
    _OTHER_TP, engines("ValueError or AssertionError on load", "as vLLM"),
)  # fmt: skip
check(
    "M27-V002", ERROR, "experts' kernel refuses the shards",
    "The backend that is picked by itself wants a GPU's columns of w2 to be a multiple of 64: of its block scales, "
    "columns come in fours, and rows of the fused w1 and w3 in multiples of 128.",
    "Take another size, or a backend that pads, as the finding says.",
    engines("NotImplementedError on load", "AssertionError on load"),
)  # fmt: skip
check(
    "M27-V003", ERROR, "expert-parallel size does not fit",
    "Whole experts are divided among GPUs, evenly, and the engine has a rule for how this and tensor parallelism meet.",
    "Take a size that divides the experts and follows the engine's rule.",
    engines("--enable-expert-parallel: the size is tensor- times data-parallel size", "--ep-size divides --tp-size"),
)  # fmt: skip
check(
    "M27-V004", ERROR, "does not fit in memory",
    "Weights as the engine spreads them, and the cache for the context, are more than 90% of the GPU's memory.",
    "Take more GPUs, a shorter context, or a checkpoint with an FP8 cache.",
    engines("out of memory, or no room for the cache", "out of memory, or no room for the cache"),
)  # fmt: skip
check(
    "M27-V005", ERROR, "context is longer than the model's",
    "max_position_embeddings in config.json is less than the context that was asked for.",
    "Ask for a shorter context.", engines("ValueError on start", "ValueError on start"),
)  # fmt: skip
check(
    "M27-V006", WARNING, "custom all-reduce crashes",
    "On GPUs without NVLink vLLM's own all-reduce is left on where there are two of them, and crashes.",
    _KNOWN_FAULT, engines("crash in the first forward; --disable-custom-all-reduce avoids it"),
)  # fmt: skip
check(
    "M27-V007", WARNING, "tensor parallelism can hang",
    "Workstation boards whose IOMMU redirects traffic between GPUs let collectives wait for ever.",
    "Pass what the finding names, or turn ACS and IOMMU translation off.",
    engines("hangs on start; NCCL_P2P_DISABLE=1 avoids it, at some speed"),
)  # fmt: skip
check(
    "M27-V008", WARNING, "attention with an FP8 cache gives gibberish",
    "FlashAttention 3 with an FP8 cache gave meaningless text for M2.5 on H100.",
    _KNOWN_FAULT, engines(sglang="repeats a word; --kv-cache-dtype bf16 avoids it, at twice the cache"),
)  # fmt: skip
check(
    "M27-V009", NOTE, "misleading warning about KV scales",
    "The engine warns that no scaling factors were provided even where it has loaded them.",
    "Nothing: this tool's checks of KV scales say whether they are there.",
    engines(sglang="prints the warning and uses the scales"),
)  # fmt: skip
check(
    "M27-V010", NOTE, "backend that corrupts the model exists",
    "flashinfer_trtllm computes M2's routing wrongly; flashinfer_trtllm_routed, which 0.5.23 picks, does not.",
    "Leave the backend to the engine, or name the right one.",
    engines(sglang="garbage with --moe-runner-backend flashinfer_trtllm, and in versions that pick it"),
)  # fmt: skip
check(
    "M27-V011", NOTE, "backend that breaks under tensor parallelism exists",
    "flashinfer_b12x is never picked by itself and gives garbage where experts are cut among GPUs.",
    "Leave the backend to the engine.", engines("garbage with --moe-backend flashinfer_b12x"),
)  # fmt: skip
check(
    "M27-V012", NOTE, "activations are not quantized on this GPU",
    "Without FP4 units the weights are unpacked to 16 bits for every product: it saves memory, not arithmetic.",
    "Nothing, where memory is the aim; input_scale is not used there.",
    engines("Marlin, W4A16", "Marlin, W4A16"),
)  # fmt: skip
