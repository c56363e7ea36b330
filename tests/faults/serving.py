"""Ways of serving M2.7 that fail, each with the check that must say so; sizes are the official ones."""

from __future__ import annotations

from dataclasses import dataclass

from m27quant.verify.engines import Engine
from m27quant.verify.serving import Serving


@dataclass(frozen=True)
class Misfit:
    """A way of serving, the check that must find it, and words of its message."""

    serving: Serving
    code: str
    words: str
    engine: Engine = "vllm"


def on(gpu: str, tp: int | None = None, ep: int | None = None, context: int | None = None) -> Serving:
    return Serving(gpu=gpu, tp=tp, ep=ep, context=context)


MISFITS = {
    "heads do not divide": Misfit(Serving(tp=32), "M27-V001", "48 query heads"),
    "key/value heads do not divide": Misfit(Serving(tp=6), "M27-V001", "8 key/value heads", "sglang"),
    "half a block of 16": Misfit(on("b200", 64), "M27-V001", "64"),
    "CUTLASS wants 64 columns, vLLM": Misfit(on("rtx-pro-6000", 16), "M27-V002", "--moe-backend marlin"),
    "CUTLASS wants 64 columns, SGLang": Misfit(
        on("gb10", 16), "M27-V002", "--moe-runner-backend marlin", "sglang"
    ),
    "experts do not divide": Misfit(on("b200", 4, ep=12), "M27-V003", "256 experts"),
    "no whole data-parallel size": Misfit(on("b200", 8, ep=4), "M27-V003", "times the data-parallel"),
    "more expert than tensor ranks": Misfit(on("b200", 4, ep=8), "M27-V003", "divides", "sglang"),
    "weights alone are too much": Misfit(on("h100", 1), "M27-V004", "125.3 GiB of weights per GPU"),
    "the cache is too much": Misfit(on("h100", 2, context=204_800), "M27-V004", "of cache for 204,800"),
    "longer than the positions": Misfit(on("b200", 8, context=300_000), "M27-V005", "300,000"),
    "all-reduce of two without NVLink": Misfit(on("gb10", 2), "M27-V006", "--disable-custom-all-reduce"),
    "workstation boards hang": Misfit(on("rtx-pro-6000", 4), "M27-V007", "NCCL_P2P_DISABLE=1"),
    "FA3 with an FP8 cache": Misfit(on("h100", 4), "M27-V008", "--kv-cache-dtype bf16", "sglang"),
    "a warning that misleads": Misfit(on("b200", 2), "M27-V009", "sglang#31224", "sglang"),
    "a backend that corrupts": Misfit(on("b200", 2), "M27-V010", "flashinfer_trtllm_routed", "sglang"),
    "b12x when sharded": Misfit(on("rtx-pro-6000", 2), "M27-V011", "vllm#47365"),
    "no FP4 units": Misfit(on("h200", 2), "M27-V012", "16-bit activations"),
}
