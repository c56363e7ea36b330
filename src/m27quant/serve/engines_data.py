"""Flags of vLLM and SGLang by engine version, as plain data: what is passed, when and why.

`flags.py` picks among them; `docs/serving.md` and the reasons beside a printed command are this very text.
`tests/serve/engine_options.json` holds the option names of the pinned wheels, which a test compares with these.
"""

from __future__ import annotations

from dataclasses import dataclass

from m27quant.verify.engines import Engine
from m27quant.verify.engines_data import Gpu

HOPPER, BLACKWELL, CONSUMER = (90,), (100, 103), (120, 121)
"""Compute capabilities."""
GPUS_PER_NODE = {"gb10": 1, "gb200": 4}
"""Where it is not eight: a DGX Spark has one, a GB200 compute tray four."""
UNIFIED_SHARE = {"gb10": 0.85}
"""Where the CPU and all that runs there lives in the same memory: at most this share of it."""
DEFAULT_STEPS = 3
"""Drafts of an EAGLE3 chain where nothing is said."""
DEFAULT_TREE_ROWS = 8
"""Rows that are verified of an EAGLE3 tree, its root included."""
MAX_DRAFT_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One option of an engine, passed for one reason."""

    name: str
    when: str
    why: str
    """Its first words fit behind the flag in a list of reasons."""
    values: tuple[str, ...] = ()
    """What is passed, where it is one of a few; a development check compares them with the parser's choices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineVersion:
    """What of one version of an engine is needed to start it."""

    name: Engine
    package: str
    """Name and version as pip takes them."""
    version: str
    shown: str
    program: tuple[str, ...]
    """What is run, in front of the model."""
    image: str
    """Container image, by the project's scheme of tags."""
    port: int
    """The engine's own default."""
    memory_share: float
    """Of a GPU's memory, what the flag of this purpose is given."""
    steps_inside: bool
    """Whether that share also holds activations."""
    key_variable: str | None
    """Environment variable that the engine reads its API key from; None where it takes a flag alone."""
    flags: dict[str, Flag]


ALWAYS = "always"

VLLM = EngineVersion(
    name="vllm",
    package="vllm==0.33.0",
    version="0.33.0",
    shown="vLLM 0.33",
    program=("vllm", "serve"),
    image="vllm/vllm-openai:v0.33.0",
    port=8000,
    memory_share=0.9,
    steps_inside=True,
    key_variable="VLLM_API_KEY",
    flags={
        "revision": Flag(
            name="--revision", when="CHECKPOINT is a Hub id",
            why="the commit that was verified, and no later one",
        ),
        "served_name": Flag(
            name="--served-model-name", when="asked for", why="the name that requests say, as you asked",
        ),
        "host": Flag(name="--host", when=ALWAYS, why="the address to listen on; its own default is all of them"),
        "port": Flag(name="--port", when=ALWAYS, why="the port to listen on"),
        "tp": Flag(
            name="--tensor-parallel-size", when=ALWAYS,
            why="GPUs that share every layer: heads and experts' rows divide among them",
        ),
        "ep": Flag(
            name="--enable-expert-parallel", when="slices of experts would be too narrow for their kernel, or --ep",
            why="whole experts to a GPU: slices of them would be too narrow for the kernel",
        ),
        "dp": Flag(
            name="--data-parallel-size", when="--ep is a multiple of --tp",
            why="expert-parallel size is tensor- times data-parallel size here",
        ),
        "nnodes": Flag(
            name="--nnodes", when="more GPUs than one machine of this kind has",
            why="machines: this kind has fewer GPUs in one",
        ),
        "node_rank": Flag(
            name="--node-rank", when="several machines", why="number of this machine, from 0",
        ),
        "master": Flag(
            name="--master-addr", when="several machines", why="address of machine 0, where the others report",
        ),
        "headless": Flag(
            name="--headless", when="machines other than the first", why="only machine 0 answers requests",
        ),
        "context": Flag(name="--max-model-len", when=ALWAYS, why="tokens of prompt and answer"),
        "share": Flag(
            name="--gpu-memory-utilization", when=ALWAYS,
            why="share of memory for weights, activations and cache, as the context was computed with",
        ),
        "max_seqs": Flag(name="--max-num-seqs", when="asked for", why="requests at a time, as you asked"),
        "kv_fp8": Flag(
            name="--kv-cache-dtype", values=("fp8",), when="config.json declares a static FP8 cache",
            why="what the checkpoint's KV scales were calibrated for: half the memory of BF16",
        ),
        "kv_bf16": Flag(
            name="--kv-cache-dtype", values=("auto",), when="config.json declares no static FP8 cache",
            why="the checkpoint declares no static FP8 cache: 16 bits",
        ),
        "moe.flashinfer_trtllm": Flag(
            name="--moe-backend", values=("flashinfer_trtllm",), when="b200, b300, gb200",
            why="FP4 tensor cores through TensorRT-LLM's kernels, which do M2's routing themselves; pads",
        ),
        "moe.flashinfer_cutedsl": Flag(
            name="--moe-backend", values=("flashinfer_cutedsl",), when="b200, b300, gb200 with data parallelism",
            why="the fastest that runs where tokens travel between data-parallel ranks",
        ),
        "moe.flashinfer_cutlass": Flag(
            name="--moe-backend", values=("flashinfer_cutlass",), when="rtx-pro-6000, gb10",
            why="FP4 tensor cores of SM12x; never flashinfer_b12x, garbage where experts are sharded (vllm#47365)",
        ),
        "moe.marlin": Flag(
            name="--moe-backend", values=("marlin",), when="h100, h200; slices no other kernel takes",
            why="W4A16: weights are unpacked to 16 bits, which needs no FP4 units and pads any slice",
        ),
        "attention.FLASHINFER": Flag(
            name="--attention-backend", values=("FLASHINFER",), when="b200, b300, gb200, rtx-pro-6000, gb10",
            why="FP8 cache on Blackwell",
        ),
        "attention.FLASH_ATTN": Flag(
            name="--attention-backend", values=("FLASH_ATTN",), when="h100, h200",
            why="FlashAttention 3: FP8 cache on Hopper",
        ),
        "no_custom_all_reduce": Flag(
            name="--disable-custom-all-reduce", when="rtx-pro-6000, gb10 with tensor parallelism",
            why="custom all-reduce crashes between GPUs without NVLink, where two leave it on (vllm#47751, #47266)",
        ),
        "auto_tools": Flag(
            name="--enable-auto-tool-choice", when=ALWAYS, why="the model decides when to call a tool",
        ),
        "tools": Flag(
            name="--tool-call-parser", values=("minimax_m2",), when=ALWAYS,
            why="reads <minimax:tool_call> blocks into tool_calls",
        ),
        "reasoning": Flag(
            name="--reasoning-parser", values=("minimax_m2",), when=ALWAYS,
            why="an answer begins inside <think>, which only the prompt opens: splits it into reasoning and content",
        ),
        "spec.dflash": Flag(
            name="--speculative-config", when="--drafter is DFlash",
            why="one pass drafts a block, of which the anchor is the first; vLLM adds one to target_layer_ids itself; "
            "FLASH_ATTN since FlashInfer's non-causal attention accepts nothing on Blackwell (vllm#48167)",
        ),
        "spec.eagle3": Flag(
            name="--speculative-config", when="--drafter is EAGLE3",
            why="a chain of drafts; vLLM reads top-level eagle_aux_hidden_state_layer_ids as hidden states",
        ),
    },
)  # fmt: skip

SGLANG = EngineVersion(
    name="sglang",
    package="sglang==0.5.23",
    version="0.5.23",
    shown="SGLang 0.5.23",
    program=("sglang", "serve", "--model-path"),
    image="lmsysorg/sglang:v0.5.23",
    port=30000,
    memory_share=0.88,
    steps_inside=False,
    key_variable=None,
    flags={
        "revision": Flag(
            name="--revision", when="CHECKPOINT is a Hub id", why="the commit that was verified, and no later one",
        ),
        "served_name": Flag(
            name="--served-model-name", when="asked for", why="the name that requests say, as you asked",
        ),
        "host": Flag(name="--host", when=ALWAYS, why="the address to listen on"),
        "port": Flag(name="--port", when=ALWAYS, why="the port to listen on; the engine's own default is 30000"),
        "api_key": Flag(
            name="--api-key", when="an API key is set",
            why="the engine takes it from no variable; the command names ours, and never the key",
        ),
        "quantization": Flag(
            name="--quantization", values=("modelopt_fp4",), when=ALWAYS, why="NVFP4 in NVIDIA ModelOpt's layout",
        ),
        "tp": Flag(
            name="--tp-size", when=ALWAYS,
            why="GPUs that share every layer: heads and experts' rows divide among them",
        ),
        "ep": Flag(
            name="--ep-size", when="slices of experts would be too narrow for their kernel, or --ep",
            why="whole experts to a GPU: slices of them would be too narrow for the kernel",
        ),
        "nnodes": Flag(
            name="--nnodes", when="more GPUs than one machine of this kind has",
            why="machines: this kind has fewer GPUs in one",
        ),
        "node_rank": Flag(
            name="--node-rank", when="several machines", why="number of this machine, from 0",
        ),
        "master": Flag(
            name="--dist-init-addr", when="several machines", why="where machine 0 waits for the others",
        ),
        "context": Flag(name="--context-length", when=ALWAYS, why="tokens of prompt and answer"),
        "share": Flag(
            name="--mem-fraction-static", when=ALWAYS,
            why="share of memory for weights and cache, as the context was computed with; activations take of the rest",
        ),
        "max_seqs": Flag(name="--max-running-requests", when="asked for", why="requests at a time, as you asked"),
        "kv_fp8": Flag(
            name="--kv-cache-dtype", values=("fp8_e4m3",), when="config.json declares an FP8 cache, not on h100, h200",
            why="what the checkpoint's KV scales were calibrated for: half the memory of BF16",
        ),
        "kv_bf16": Flag(
            name="--kv-cache-dtype", values=("bf16",), when="config.json declares no FP8 cache",
            why="the checkpoint declares no FP8 cache",
        ),
        "kv_bf16_fa3": Flag(
            name="--kv-cache-dtype", values=("bf16",), when="config.json declares an FP8 cache, on h100, h200",
            why="fa3 with an FP8 cache gave gibberish (sglang#20820); twice the memory",
        ),
        "moe.flashinfer_trtllm_routed": Flag(
            name="--moe-runner-backend", values=("flashinfer_trtllm_routed",), when="b200, b300, gb200",
            why="FP4 tensor cores; plain flashinfer_trtllm corrupts this model (sglang#26324)",
        ),
        "moe.flashinfer_cutlass": Flag(
            name="--moe-runner-backend", values=("flashinfer_cutlass",), when="rtx-pro-6000, gb10",
            why="FP4 tensor cores of SM12x",
        ),
        "moe.marlin": Flag(
            name="--moe-runner-backend", values=("marlin",), when="h100, h200; slices no other kernel takes",
            why="W4A16: weights are unpacked to 16 bits, which needs no FP4 units and pads any slice",
        ),
        "attention.trtllm_mha": Flag(
            name="--attention-backend", values=("trtllm_mha",), when="b200, b300, gb200",
            why="FP8 cache on datacenter Blackwell",
        ),
        "attention.flashinfer": Flag(
            name="--attention-backend", values=("flashinfer",),
            when="rtx-pro-6000, gb10; a tree of drafts on b200, b300, gb200",
            why="FP8 cache where trtllm_mha does not run: SM12x, and trees of drafts",
        ),
        "attention.fa3": Flag(
            name="--attention-backend", values=("fa3",), when="h100, h200", why="FlashAttention 3, Hopper's own",
        ),
        "no_custom_all_reduce": Flag(
            name="--disable-custom-all-reduce", when="rtx-pro-6000, gb10 with tensor parallelism",
            why="no NVLink between these GPUs: NCCL does it",
        ),
        "tools": Flag(
            name="--tool-call-parser", values=("minimax-m2",), when=ALWAYS,
            why="reads <minimax:tool_call> blocks into tool_calls",
        ),
        "reasoning": Flag(
            name="--reasoning-parser", values=("minimax",), when=ALWAYS,
            why="an answer begins inside <think>, which only the prompt opens: splits it into reasoning and content",
        ),
        "spec.eagle3": Flag(
            name="--speculative-algorithm", values=("EAGLE3",), when="--drafter is EAGLE3",
            why="its taps: SGLang adds one to the ids in eagle_config, and reads no others",
        ),
        "draft_model": Flag(
            name="--speculative-draft-model-path", when="--drafter is EAGLE3", why="the drafter",
        ),
        "draft_revision": Flag(
            name="--speculative-draft-model-revision", when="drafter from the Hub", why="the commit that was checked",
        ),
        "draft_steps": Flag(
            name="--speculative-num-steps", when="--drafter is EAGLE3", why="depth of the drafts",
        ),
        "draft_topk": Flag(
            name="--speculative-eagle-topk", when="--drafter is EAGLE3",
            why="branches of each node: 1 is a chain, which is all that trtllm_mha takes",
        ),
        "draft_rows": Flag(
            name="--speculative-num-draft-tokens", when="--drafter is EAGLE3",
            why="rows that are verified, with the root",
        ),
        "draft_unquantized": Flag(
            name="--speculative-draft-model-quantization", values=("unquant",), when="--drafter is EAGLE3",
            why="without it the drafter inherits --quantization: error or garbage",
        ),
    },
)  # fmt: skip

VERSIONS: dict[Engine, EngineVersion] = {"vllm": VLLM, "sglang": SGLANG}

V2_RUNNER = ("VLLM_USE_V2_MODEL_RUNNER", "1")
V2_RUNNER_WHY = (
    "vLLM's V1 runner takes the ids nested in eagle_config one layer too early (vllm#43671); V2, which is the default, "
    "ignores them and takes its defaults, which are this drafter's taps"
)
DRAFT_CACHE_WHY = (
    "its own cache in BF16, as drafts look at each other in both directions, for which attention with an FP8 cache "
    "was missing (vllm#41559, #48787)"
)
NEVER = {
    "--trust-remote-code": "never needed: both engines have MiniMax-M2, EAGLE3 and DFlash of their own, and the remote "
    "configuration's token ids are wrong",
    "--quantization (vLLM)": "vLLM reads it from config.json's quantization_config",
    "--calculate-kv-scales": "gone in vLLM 0.33; the checkpoint brings its scales",
    "--speculative-dflash-block-size": "SGLang 0.5.23 refuses DFlash for MiniMax-M2: there is no "
    "set_dflash_layers_to_capture for it",
}
"""Flags that are left out on purpose."""


def share_of(engine: EngineVersion, gpu: Gpu) -> float:
    """The share of a GPU's memory that the engine is given where nothing else is asked for."""
    return min(engine.memory_share, UNIFIED_SHARE.get(gpu.name, 1.0))
