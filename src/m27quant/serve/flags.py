"""From a way of serving to an engine's options, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from m27quant.serve.engines_data import CONSUMER, EngineVersion, Flag
from m27quant.serve.memory_fit import Fit
from m27quant.serve.speculation import Speculation
from m27quant.verify.engines_data import Backend, Gpu

DIST_PORT = 25_000
"""Where SGLang's machines meet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One way of serving, decided: what the options say."""

    engine: EngineVersion
    gpu: Gpu
    tp: int
    ep: int | None
    backend: Backend
    attention: str
    fp8_declared: bool
    """What config.json asks for, as this engine reads it."""
    fp8_cache: bool
    """What is passed."""
    fit: Fit
    host: str
    port: int
    served_name: str | None = None
    max_seqs: int | None = None
    has_key: bool = False
    revision: str | None = None
    nnodes: int = 1
    node_rank: int = 0
    master: str | None = None
    speculation: Speculation | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """An option of the command."""

    flag: Flag
    value: str | None = None
    detail: str = ""
    """Figures of this very command, behind the reason."""
    variable: str | None = None
    """An environment variable that holds the value: what must not stand in a command."""

    @property
    def why(self) -> str:
        """The reason, with its figures."""
        return f"{self.flag.why}: {self.detail}" if self.detail else self.flag.why


def choose(s: Setup) -> list[Choice]:
    """Every option, in the order of the command."""
    return [*_network(s), *_spread(s), *_memory(s), *_kernels(s), *_answers(s), *_drafts(s)]


def _network(s: Setup) -> Iterator[Choice]:
    f = s.engine.flags
    if s.revision is not None:
        yield Choice(f["revision"], s.revision)
    if s.served_name is not None:
        yield Choice(f["served_name"], s.served_name)
    yield Choice(f["host"], s.host)
    yield Choice(f["port"], str(s.port))
    if s.has_key and "api_key" in f:
        yield Choice(f["api_key"], variable="M27QUANT_API_KEY")


def _spread(s: Setup) -> Iterator[Choice]:
    f = s.engine.flags
    if "quantization" in f:
        yield Choice(f["quantization"], *f["quantization"].values)
    yield Choice(f["tp"], str(s.tp))
    if s.ep is not None:
        yield Choice(f["ep"], str(s.ep) if s.engine.name == "sglang" else None)
        if "dp" in f and s.ep > s.tp:
            yield Choice(f["dp"], str(s.ep // s.tp))
    if s.nnodes > 1:
        yield Choice(f["nnodes"], str(s.nnodes))
        yield Choice(f["node_rank"], str(s.node_rank))
        where = s.master or MASTER
        yield Choice(f["master"], f"{where}:{DIST_PORT}" if s.engine.name == "sglang" else where)
        if "headless" in f and s.node_rank:
            yield Choice(f["headless"])


MASTER = "MASTER_ADDR"
"""Stands for the address that was not given."""


def _memory(s: Setup) -> Iterator[Choice]:
    f = s.engine.flags
    yield Choice(f["context"], str(s.fit.context), s.fit.describe())
    yield Choice(f["share"], f"{s.fit.share:g}")
    if s.max_seqs is not None:
        yield Choice(f["max_seqs"], str(s.max_seqs))
    kind = "kv_fp8" if s.fp8_cache else "kv_bf16_fa3" if s.fp8_declared else "kv_bf16"
    yield Choice(f[kind], *f[kind].values)


def _kernels(s: Setup) -> Iterator[Choice]:
    f = s.engine.flags
    yield Choice(f[f"moe.{s.backend.name}"], s.backend.name)
    yield Choice(f[f"attention.{s.attention}"], s.attention)
    if s.gpu.sm in CONSUMER and max(s.tp, s.ep or 1) > 1:
        yield Choice(f["no_custom_all_reduce"])


def _answers(s: Setup) -> Iterator[Choice]:
    f = s.engine.flags
    if "auto_tools" in f:
        yield Choice(f["auto_tools"])
    yield Choice(f["tools"], *f["tools"].values)
    yield Choice(f["reasoning"], *f["reasoning"].values)


def _drafts(s: Setup) -> Iterator[Choice]:
    if s.speculation is None:
        return
    f, d = s.engine.flags, s.speculation
    if s.engine.name == "vllm":
        config: dict[str, Any] = {"method": d.kind, "model": d.model}
        if d.revision is not None:
            config["revision"] = d.revision
        config["num_speculative_tokens"] = d.steps
        if d.kind == "dflash":
            config["attention_backend"] = "FLASH_ATTN"
        if d.bf16_cache:
            config["kv_cache_dtype"] = "bfloat16"
        yield Choice(f[f"spec.{d.kind}"], json.dumps(config, separators=(",", ":")), d.detail)
        return
    yield Choice(f["spec.eagle3"], f["spec.eagle3"].values[0], d.detail)
    yield Choice(f["draft_model"], d.model)
    if d.revision is not None:
        yield Choice(f["draft_revision"], d.revision)
    yield Choice(f["draft_steps"], str(d.steps))
    yield Choice(f["draft_topk"], str(d.topk))
    yield Choice(f["draft_rows"], str(d.rows))
    yield Choice(f["draft_unquantized"], *f["draft_unquantized"].values)
