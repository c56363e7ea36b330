"""From wishes, a model's sizes and a GPU to one way of serving: parallelism, kernels, context, drafts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.drafter_config import DrafterConfig, Taps, read_taps
from m27quant.checkpoint.hub import Location
from m27quant.errors import UsageError
from m27quant.serve.engines_data import GPUS_PER_NODE, HOPPER, EngineVersion, share_of
from m27quant.serve.flags import Setup
from m27quant.serve.memory_fit import Fit, fit
from m27quant.serve.speculation import Speculation, Wish, drafter_size, plan_drafts
from m27quant.verify.collect import Findings
from m27quant.verify.engines import Engine
from m27quant.verify.engines_data import ATTENTION, BACKENDS, PADDING_BACKEND, Backend, Gpu
from m27quant.verify.run import Level
from m27quant.verify.serving import cache_is_fp8, memory, pick, slices_of, tensor_parallel_sizes
from m27quant.verify.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """How to serve; what is None is chosen."""

    engine: Engine
    gpu: str | None = None
    tp: int | None = None
    ep: int | None = None
    drafter: str | None = None
    wish: Wish = field(default_factory=Wish)
    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    memory_share: float | None = None
    """Of a GPU's memory, for the engine."""
    has_key: bool = False
    """An API key is asked for; the key itself is none of the command's."""
    node_rank: int = 0
    master: str | None = None
    level: Level = "default"
    revision: str | None = None
    offline: bool = False
    token: str | None = None


@dataclass(frozen=True, slots=True)
class FoundDrafter:
    """A drafter's folder, its config where it can be used, and the bytes of its weights."""

    location: Location
    config: DrafterConfig | None
    weight_bytes: int

    @property
    def model(self) -> str:
        return self.location.repo_id or os.path.abspath(self.location.folder)  # noqa: PTH100


def decide(
    view: View,
    c: M2Config,
    engine: EngineVersion,
    gpu: Gpu,
    there: int | None,
    options: LaunchOptions,
    drafter: FoundDrafter | None,
) -> tuple[Setup, set[str]]:
    """The setup, and the codes of findings that its flags solve."""
    if options.tp and there is not None and max(options.tp, options.ep or 1) > there * _most_nodes(options):
        raise UsageError(
            f"--tp {options.tp}: this machine has {there} {gpu.name}",
            hint="name the GPUs that will serve with --gpu, or machine 0 with --master-addr where several serve",
        )
    sizes = [options.tp] if options.tp else _sizes(c, engine, gpu, there)
    for tp in sizes:
        setup, solved = _with_tp(view, c, engine, gpu, tp, options, drafter)
        if setup.fit.fits:
            break
    if options.node_rank >= setup.nnodes:
        raise UsageError(f"--node-rank {options.node_rank}: {setup.nnodes} machines serve, counted from 0")
    return setup, solved


def _most_nodes(options: LaunchOptions) -> int:
    """Machines that may take part: more than this one where its number or the first one's address is named."""
    return 1 if options.master is None and not options.node_rank else 1 << 10


def _sizes(c: M2Config, engine: EngineVersion, gpu: Gpu, there: int | None) -> list[int]:
    """Tensor-parallel sizes to try, the smallest first."""
    sizes = tensor_parallel_sizes(c, pick(engine.name, gpu).needs) or [1]
    return [tp for tp in sizes if there is None or tp <= there] or [1]


def _with_tp(
    view: View,
    c: M2Config,
    engine: EngineVersion,
    gpu: Gpu,
    tp: int,
    options: LaunchOptions,
    drafter: FoundDrafter | None,
) -> tuple[Setup, set[str]]:
    ep, backend, solved = _spread(c, engine.name, gpu, tp, options.ep)
    slices = slices_of(engine.name, tp, ep)
    declared = cache_is_fp8(view, engine.name)
    fp8_cache = declared and not (engine.name == "sglang" and gpu.sm in HOPPER)  # M27-V008
    speculation = _speculation(engine, c, options, drafter, fp8_cache)
    size = None
    if speculation is not None and drafter is not None and drafter.config is not None:
        draft_fp8 = fp8_cache and not speculation.bf16_cache
        size = drafter_size(drafter.config, drafter.weight_bytes, tp, fp8_cache=draft_fp8)
    needed = memory(c, tp, slices, ep or 1, fp8_cache=fp8_cache, pads_to=backend.pads_to)
    found: Fit = fit(
        needed, c, gpu, tp=tp, slices=slices, share=options.memory_share or share_of(engine, gpu),
        steps_inside=engine.steps_inside, drafter=size, wanted=options.max_model_len,
    )  # fmt: skip
    attention = ATTENTION[engine.name][gpu.sm]
    if speculation is not None and speculation.topk > 1 and attention == "trtllm_mha":
        attention = "flashinfer"
    gpus, per_node = max(tp, ep or 1), GPUS_PER_NODE.get(gpu.name, 8)
    return Setup(
        engine=engine, gpu=gpu, tp=tp, ep=ep, backend=backend, attention=attention, fp8_declared=declared,
        fp8_cache=fp8_cache, fit=found, host=options.host, port=options.port, served_name=options.served_name,
        max_seqs=options.max_num_seqs, has_key=options.has_key, nnodes=-(-gpus // per_node),
        node_rank=options.node_rank, master=options.master, speculation=speculation,
    ), solved  # fmt: skip


def _spread(
    c: M2Config, engine: Engine, gpu: Gpu, tp: int, ep: int | None
) -> tuple[int | None, Backend, set[str]]:
    """Whole experts to a GPU, or a kernel that pads, where slices would be too narrow for the picked one."""
    backend = pick(engine, gpu, all_to_all=engine == "vllm" and (ep or 1) > tp)
    if (ep or 1) > 1 or c.intermediate_size % (tp * backend.needs) == 0:
        return (ep if ep != 1 else None), backend, set()
    if ep is None and tp > 1 and c.num_local_experts % tp == 0 and c.intermediate_size % backend.needs == 0:
        return tp, pick(engine, gpu), set()
    padding = next((b for b in BACKENDS[engine] if b.name == PADDING_BACKEND and gpu.sm in b.sm), None)
    return (None, backend, set()) if padding is None else (None, padding, {"M27-V002"})


def _speculation(
    engine: EngineVersion,
    c: M2Config,
    options: LaunchOptions,
    drafter: FoundDrafter | None,
    fp8_cache: bool,
) -> Speculation | None:
    if drafter is None or drafter.config is None:
        return None
    taps: Taps | None = read_taps(drafter.config, c.num_hidden_layers, Findings())
    return plan_drafts(
        drafter.config, taps, options.wish, engine=engine, layers=c.num_hidden_layers,
        fp8_cache=fp8_cache, model=drafter.model, revision=drafter.location.commit,
    )  # fmt: skip
