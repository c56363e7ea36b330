"""What is known of GPUs and engines, by engine version, as plain data; `serving.py` applies it.

Sources: NVIDIA's data sheets and `nvidia-smi` for the GPUs, vLLM 0.33 and SGLang 0.5.23 for all else.
"""

from __future__ import annotations

from dataclasses import dataclass

from m27quant.verify.engines import Engine

MIB, GB = 2**20, 10**9
MEMORY_SHARE = 0.9
"""Of a GPU's memory, what is counted on for weights and cache; the rest is for activations, graphs and the driver."""
VOCAB_MULTIPLE = 64
"""Rows of embedding and head are padded to it before they are sharded."""
VERSIONS: dict[Engine, str] = {"vllm": "vLLM 0.33", "sglang": "SGLang 0.5.23"}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU: `sm` is its compute capability without the point."""

    name: str
    sm: int
    memory_bytes: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 100, 183_359 * MIB),
        Gpu("b300", 103, 270 * GB),  # data sheet: HGX B300, 2.1 TB in eight
        Gpu("gb200", 100, 186 * GB),  # data sheet: GB200 NVL72, 13.4 TB in 72
        Gpu("rtx-pro-6000", 120, 97_887 * MIB),
        Gpu("gb10", 121, 128 * GB),  # data sheet: shared with the CPU and all that runs there
        Gpu("h200", 90, 143_771 * MIB),
        Gpu("h100", 90, 81_559 * MIB),
    )
}


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of the experts' matrix products."""

    name: str
    sm: tuple[int, ...]
    pads_to: int
    """Columns of w2 that one GPU holds are padded to this multiple; 1 where nothing is padded."""
    needs: int = 16
    """... or must be a multiple of this."""
    all_to_all: bool = True
    """Whether it runs where tokens travel between data-parallel ranks."""
    weight_only: bool = False
    """Activations stay in 16 bits, input_scale is not used."""


# Of a CUTLASS kernel's fused w1 and w3, rows must be a multiple of 128; of w2's block scales, columns one of 4.
# Both say the same of the columns of w2 that a GPU holds: a multiple of 64.
_BLACKWELL, _CONSUMER, _HOPPER = (100, 103), (120, 121), (90,)
BACKENDS: dict[Engine, tuple[Backend, ...]] = {
    "vllm": (
        Backend("flashinfer_trtllm", _BLACKWELL, pads_to=64, all_to_all=False),
        Backend("flashinfer_cutedsl", _BLACKWELL, pads_to=1, needs=64),
        Backend("flashinfer_cutlass", _BLACKWELL + _CONSUMER, pads_to=1, needs=64),
        Backend("marlin", _HOPPER + _BLACKWELL + _CONSUMER, pads_to=64, weight_only=True),
    ),
    "sglang": (
        Backend("flashinfer_trtllm_routed", _BLACKWELL, pads_to=64),
        Backend("flashinfer_cutlass", _CONSUMER, pads_to=1, needs=64),
        Backend("marlin", _HOPPER, pads_to=64, weight_only=True),
    ),
}
"""In the order in which `auto` tries them."""
BACKEND_FLAG: dict[Engine, str] = {"vllm": "--moe-backend", "sglang": "--moe-runner-backend"}
PADDING_BACKEND = "marlin"
"""Takes any size on every GPU of the table."""

ATTENTION: dict[Engine, dict[int, str]] = {
    "vllm": {90: "FLASH_ATTN", 100: "FLASHINFER", 103: "FLASHINFER", 120: "FLASHINFER", 121: "FLASHINFER"},
    "sglang": {90: "fa3", 100: "trtllm_mha", 103: "trtllm_mha", 120: "flashinfer", 121: "flashinfer"},
}
"""Attention backend that `auto` picks, by compute capability."""


@dataclass(frozen=True, slots=True)
class Known:
    """A known fault of an engine version: where it strikes, and the flag that avoids it (empty: none is needed)."""

    code: str
    engine: Engine
    message: str
    flag: str
    sm: tuple[int, ...] = ()
    """Any where empty."""
    gpus: tuple[str, ...] = ()
    min_tp: int = 1
    max_tp: int = 1 << 30
    fp8_cache: bool = False
    """Only with an FP8 cache."""
    kv_scales: bool | None = None
    """Only with, or only without, stored KV scales."""


KNOWN = (
    Known(
        "M27-V006", "vllm",
        "custom all-reduce crashes with two GPUs without NVLink (vllm#47751, #47266)",
        "--disable-custom-all-reduce", sm=_CONSUMER, min_tp=2, max_tp=2,
    ),
    Known(
        "M27-V007", "vllm",
        "tensor parallelism can hang where GPUs cannot reach each other over PCIe (vllm#51513, #42063)",
        "NCCL_P2P_DISABLE=1 in the environment", gpus=("rtx-pro-6000",), min_tp=2,
    ),
    Known(
        "M27-V008", "sglang",
        "the attention that is picked, fa3, gave gibberish with an FP8 cache (sglang#20820)",
        "--kv-cache-dtype bf16", sm=_HOPPER, fp8_cache=True,
    ),
    Known(
        "M27-V009", "sglang",
        'it warns of "no scaling factors provided" even where it has loaded them (sglang#31224)',
        "", fp8_cache=True, kv_scales=True,
    ),
    Known(
        "M27-V010", "sglang",
        "flashinfer_trtllm, which earlier versions pick, corrupts this model (sglang#26324)",
        "--moe-runner-backend flashinfer_trtllm_routed", sm=_BLACKWELL,
    ),
    Known(
        "M27-V011", "vllm",
        "flashinfer_b12x, which is never picked by itself, gives garbage where experts are sharded (vllm#47365)",
        "--moe-backend flashinfer_cutlass", sm=_CONSUMER, min_tp=2,
    ),
)  # fmt: skip
