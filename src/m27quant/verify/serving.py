"""Will it run?  A checkpoint's sizes against GPUs and the way engines spread a model over them.

All of it is arithmetic on config.json, with the engines' rules of `engines_data`; nothing is started or asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from m27quant.checkpoint.config import GROUP_SIZE, M2Config
from m27quant.errors import UsageError, escape
from m27quant.verify.collect import Findings
from m27quant.verify.engines import ENGINES, SHOWN, Engine
from m27quant.verify.engines_data import (
    ATTENTION,
    BACKEND_FLAG,
    BACKENDS,
    GPUS,
    KNOWN,
    MEMORY_SHARE,
    PADDING_BACKEND,
    VERSIONS,
    VOCAB_MULTIPLE,
    Backend,
    Gpu,
    Known,
)
from m27quant.verify.view import View

MAX_GPUS = 1024
MAX_LISTED_TP = 64
GIB = 2**30
STRICT = 64
"""What the pickiest backend wants of a GPU's columns of w2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How somebody means to serve the checkpoint; what is None is chosen or left open."""

    gpu: str | None = None
    """A name in `GPUS`."""
    tp: int | None = None
    """GPUs that share every layer; None: the smallest number that holds the model."""
    ep: int | None = None
    """GPUs among which whole experts are divided; None: every GPU holds a slice of each."""
    context: int | None = None
    """Tokens whose keys and values must fit at once."""

    def __post_init__(self) -> None:
        if self.gpu is not None and self.gpu not in GPUS:
            raise UsageError(f"unknown gpu '{escape(self.gpu)}'", hint=f"one of: {', '.join(GPUS)}")
        for name, most in (("tp", MAX_GPUS), ("ep", MAX_GPUS), ("context", 2**31 - 1)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise UsageError(f"{name} {escape(value)} is not between 1 and {most:,}")

    def __bool__(self) -> bool:
        """Whether anything is asked."""
        return any(value is not None for value in (self.gpu, self.tp, self.ep, self.context))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each GPU."""

    weights: int
    cache_per_token: int

    def total(self, tokens: int) -> int:
        """With a cache for `tokens` tokens."""
        return self.weights + tokens * self.cache_per_token


# -- sizes -----------------------------------------------------------------------------------------


def check_serving(
    view: View, found: Findings, serving: Serving, engines: tuple[Engine, ...] = ENGINES
) -> dict[str, Any]:
    """Check one way of serving for each engine; returns what will be picked and what it takes, by engine."""
    c = view.config
    if c is None or not serving:
        return {}
    if serving.context is not None and serving.context > c.max_position_embeddings:
        found.add(
            "M27-V005", f"a context of {serving.context:,} tokens, config.json allows {c.max_position_embeddings:,}",
            file="config.json", expected=c.max_position_embeddings, found=serving.context,
        )  # fmt: skip
    return {engine: _check_engine(engine, view, c, serving, found) for engine in engines}


def tensor_parallel_sizes(c: M2Config, multiple: int = GROUP_SIZE) -> list[int]:
    """Sizes up to 64 that divide heads and experts so that each GPU's columns of w2 are such a multiple.

    `GROUP_SIZE` is enough for backends that pad, `STRICT` for every one.
    """
    return [
        tp
        for tp in range(1, MAX_LISTED_TP + 1)
        if not list(_indivisible(c, tp, 1)) and c.intermediate_size // tp % multiple == 0
    ]


def _indivisible(c: M2Config, tp: int, experts_over: int) -> Iterator[str]:
    """Why `tp` GPUs cannot share a layer, with experts' rows cut into `experts_over` slices."""
    if c.num_attention_heads % tp:
        yield f"{c.num_attention_heads} query heads do not divide among {tp} GPUs"
    if c.num_key_value_heads % tp and tp % c.num_key_value_heads:
        yield f"{c.num_key_value_heads} key/value heads neither divide among nor into {tp} GPUs"
    if c.intermediate_size % experts_over or c.intermediate_size // experts_over % GROUP_SIZE:
        yield (
            f"an expert's {c.intermediate_size:,} rows do not divide into {experts_over} slices "
            f"of whole blocks of {GROUP_SIZE}"
        )


def slices_of(engine: Engine, tp: int, ep: int | None) -> int:
    """Among how many GPUs one expert's matrices are cut."""
    if ep is None or ep == 1:
        return tp
    return 1 if engine == "vllm" else max(1, tp // ep)


def memory(c: M2Config, tp: int, experts_over: int, ep: int, *, fp8_cache: bool, pads_to: int = 1) -> Memory:
    """Bytes on the fullest GPU, as both engines spread the model.

    Attention, embedding and head are cut by `tp` (key/value heads are repeated where there are fewer than
    GPUs), experts divided among `ep` GPUs and each cut into `experts_over`; router and norms are repeated.
    """
    d, head = c.hidden_size, c.head_dim
    q, kv = -(-c.num_attention_heads // tp) * head, -(-c.num_key_value_heads // tp) * head
    attention = 2 * (2 * q * d + 2 * kv * d) + 2 * (q + kv + 2 * d)
    router = 4 * (c.num_local_experts * d + c.num_local_experts)
    rows = _up(-(-c.intermediate_size // experts_over), pads_to)
    weights = 3 * rows * d
    matrices = weights // 2 + weights // GROUP_SIZE + 3 * 2 * 4
    vocabulary = -(-_up(c.vocab_size, VOCAB_MULTIPLE) // tp)
    layer = attention + router + -(-c.num_local_experts // ep) * matrices
    return Memory(
        weights=c.num_hidden_layers * layer + 2 * 2 * vocabulary * d + 2 * d,
        cache_per_token=c.num_hidden_layers * 2 * kv * (1 if fp8_cache else 2),
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# -- one engine ------------------------------------------------------------------------------------


def _check_engine(
    engine: Engine, view: View, c: M2Config, serving: Serving, found: Findings
) -> dict[str, Any]:
    gpu = None if serving.gpu is None else GPUS[serving.gpu]
    tp = serving.tp or _smallest(engine, view, c, serving, gpu)
    facts: dict[str, Any] = {"engine": VERSIONS[engine], "tensor_parallel": tp}
    if serving.ep is not None:
        facts["expert_parallel"] = serving.ep
    if not _check_division(engine, c, tp, serving.ep, found):
        return facts
    slices = slices_of(engine, tp, serving.ep)
    backend = None
    if gpu is not None:
        backend = pick(engine, gpu, all_to_all=engine == "vllm" and (serving.ep or 1) > tp)
        facts |= {
            "gpu": gpu.name,
            "moe_backend": backend.name,
            "attention_backend": ATTENTION[engine][gpu.sm],
        }
        _check_backend(engine, c, backend, slices, found)
    pads_to = 1 if backend is None else backend.pads_to
    needed = memory(c, tp, slices, serving.ep or 1, fp8_cache=cache_is_fp8(view, engine), pads_to=pads_to)
    facts |= _check_memory(engine, needed, serving.context, gpu, tp, found)
    if gpu is not None:
        _check_known(engine, view, gpu, tp, found)
    return facts


def _smallest(engine: Engine, view: View, c: M2Config, serving: Serving, gpu: Gpu | None) -> int:
    """The fewest GPUs that hold weights and context; the most that are possible where none do."""
    if gpu is None:
        return 1
    sizes = tensor_parallel_sizes(c, pick(engine, gpu).needs) or [1]
    for tp in sizes:
        if serving.ep is not None and (serving.ep % tp if engine == "vllm" else tp % serving.ep):
            continue
        needed = memory(
            c, tp, slices_of(engine, tp, serving.ep), serving.ep or 1, fp8_cache=cache_is_fp8(view, engine)
        )
        if needed.total(serving.context or 0) <= MEMORY_SHARE * gpu.memory_bytes:
            return tp
    return sizes[-1]


def cache_is_fp8(view: View, engine: Engine) -> bool:
    """Whether the engine's automatic choice is an FP8 cache; vLLM wants the scheme to be static, too."""
    scheme = None if view.section is None else view.section.get("kv_cache_scheme")
    if engine == "vllm" and isinstance(scheme, dict):
        return scheme.get("dynamic") is False
    return view.kv_declared


def pick(engine: Engine, gpu: Gpu, *, all_to_all: bool = False) -> Backend:
    """The backend for experts that `auto` takes on this GPU."""
    return next(b for b in BACKENDS[engine] if gpu.sm in b.sm and (b.all_to_all or not all_to_all))


def _check_division(engine: Engine, c: M2Config, tp: int, ep: int | None, found: Findings) -> bool:
    """Whether the model can be cut so at all."""
    good = True
    for why in _indivisible(c, tp, slices_of(engine, tp, ep)):
        good = False
        sizes = ", ".join(map(str, tensor_parallel_sizes(c))) or "none"
        found.add(
            "M27-V001", f"tensor-parallel size {tp}: {why}", expected=f"one of {sizes}", found=tp
        )  # fmt: skip
    if ep is None:
        return good
    wrong = None
    if c.num_local_experts % ep:
        wrong = f"{c.num_local_experts} experts do not divide among {ep} GPUs"
    elif engine == "vllm" and ep % tp:
        wrong = f"in vLLM it is the tensor-parallel size ({tp}) times the data-parallel size"
    elif engine == "sglang" and tp % ep:
        wrong = f"in SGLang it divides the tensor-parallel size ({tp})"
    if wrong:
        found.add("M27-V003", f"expert-parallel size {ep}: {wrong}", found=ep)
    return good and wrong is None


def _check_backend(engine: Engine, c: M2Config, backend: Backend, slices: int, found: Findings) -> None:
    columns = c.intermediate_size // slices
    if columns % backend.needs:
        flag = f"{BACKEND_FLAG[engine]} {PADDING_BACKEND}"
        found.add(
            "M27-V002",
            f"{SHOWN[engine]} picks {backend.name}, which refuses {columns} columns of w2 per GPU; {flag} pads them",
            expected=f"a multiple of {backend.needs}", found=columns,
        )  # fmt: skip
    if backend.weight_only:
        found.add(
            "M27-V012", f"{SHOWN[engine]} picks {backend.name} on this GPU: 4-bit weights, 16-bit activations",
        )  # fmt: skip


def _check_memory(
    engine: Engine, needed: Memory, context: int | None, gpu: Gpu | None, tp: int, found: Findings
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "weights_per_gpu_bytes": needed.weights,
        "cache_per_gpu_bytes_per_token": needed.cache_per_token,
    }
    if context is not None:
        facts["cache_per_gpu_bytes"] = context * needed.cache_per_token
    if gpu is None:
        return facts
    usable = int(MEMORY_SHARE * gpu.memory_bytes)
    facts |= {
        "usable_per_gpu_bytes": usable,
        "cache_tokens_that_fit": max(0, (usable - needed.weights) // needed.cache_per_token),
    }
    if (total := needed.total(context or 1)) > usable:
        cache = f" + {_gib(total - needed.weights)} of cache for {context:,} tokens" if context else ""
        found.add(
            "M27-V004",
            f"tensor-parallel size {tp} in {SHOWN[engine]}: {_gib(needed.weights)} of weights{cache} per GPU; "
            f"{gpu.name} has {_gib(gpu.memory_bytes)}, {MEMORY_SHARE:.0%} of it counted: {_gib(usable)}",
            expected=f"at most {_gib(usable)}", found=_gib(total),
        )  # fmt: skip
    return facts


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _check_known(engine: Engine, view: View, gpu: Gpu, tp: int, found: Findings) -> None:
    stored = any(name.endswith(".k_scale") for name in view.tensors)
    for known in KNOWN:
        if known.engine == engine and _strikes(known, gpu, tp, cache_is_fp8(view, engine), stored):
            avoided = f"; what avoids it: {known.flag}" if known.flag else ""
            found.add(
                known.code,
                f"{VERSIONS[engine]} on {gpu.name}: {known.message}{avoided}",
                expected=known.flag or None,
            )


def _strikes(known: Known, gpu: Gpu, tp: int, fp8_cache: bool, kv_scales: bool) -> bool:
    return (
        (not known.sm or gpu.sm in known.sm)
        and (not known.gpus or gpu.name in known.gpus)
        and known.min_tp <= tp <= known.max_tp
        and (fp8_cache or not known.fp8_cache)
        and known.kv_scales in (None, kv_scales)
    )
