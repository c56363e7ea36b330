"""The whole benchmark: every task at every concurrency with every setting, side by side in one run."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m27quant.bench.measure import Subject, measure
from m27quant.bench.requests import BenchOptions
from m27quant.bench.result import BenchResult
from m27quant.bench.sweep import recommend
from m27quant.bench.tasks import Loaded, load_task
from m27quant.bench.variants import check_settings, describe, resized, run_flags
from m27quant.environment import describe_environment
from m27quant.errors import UsageError, escape
from m27quant.progress import ProgressCallback, ignore

if TYPE_CHECKING:
    from m27quant.runtime.api import LLM
    from m27quant.runtime.options import RunOptions
    from m27quant.runtime.speculative.load import DrafterOptions
    from m27quant.runtime.speculative.proposal import Drafter


def bench_checkpoint(
    checkpoint: str | Path,
    options: BenchOptions | None = None,
    *,
    drafter: str | Path | None = None,
    drafter_options: DrafterOptions | None = None,
    run_options: RunOptions | None = None,
    check: bool = True,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    loading: Callable[[int, int], None] = lambda done, total: None,
    progress: ProgressCallback = ignore,
    stop: Callable[[], None] = lambda: None,
    on_cell: Callable[[BenchResult], None] = lambda result: None,
) -> BenchResult:
    """Measure the bundled runtime on tasks, without a drafter and with it at each setting.

    Args:
        checkpoint: a folder or a Hub id.
        options: what is asked.
        drafter: a folder or a Hub id with a DFlash or EAGLE3 drafter, or `ngram`.
        drafter_options: how it is configured, where `options.settings` says nothing else.
        run_options: how the model runs; as many sequences at once as the greatest concurrency, in any case.
        check: compare the checkpoint with verify's rules first.
        revision: of a Hub id.
        offline: take from the Hub's cache only.
        token: for the Hub.
        say: takes one line about each thing that was decided.
        loading: called with layers loaded and layers in all.
        progress: takes snapshots of the measuring.
        stop: called between steps; what it raises ends the run.
        on_cell: called with the result so far whenever a part of it was measured.

    Raises:
        UsageError: options that cannot be, or that this drafter does not have.
        CheckpointError: the checkpoint, the drafter or a row of a task that cannot be used.
        EnvironmentFault: it does not fit, the Hub cannot be reached, or no request was answered.
    """
    from dataclasses import replace

    from m27quant.bench.inprocess import InProcess
    from m27quant.checkpoint.hub import locate
    from m27quant.llm import load
    from m27quant.runtime.options import RunOptions as Options
    from m27quant.runtime.speculative.choose import NGRAM, make_named
    from m27quant.runtime.speculative.load import DrafterOptions

    options = options or BenchOptions()
    if drafter is None and (options.settings or drafter_options not in (None, DrafterOptions())):
        raise UsageError("settings of a drafter, but no drafter", hint="name one with --drafter")
    hub: dict[str, Any] = {"offline": offline, "token": token}
    locate(
        str(checkpoint), revision=revision, weights=False, **hub
    )  # a slip is heard of before anything is fetched
    folder = None
    if drafter is not None and str(drafter) != NGRAM:
        folder = locate(str(drafter), **hub).folder
    check_settings(folder, options.settings)
    tasks = _tasks(options, offline, token)
    location = locate(str(checkpoint), revision=revision, **hub)
    variants: list[Drafter] = []

    def largest(model: Any) -> Drafter:
        """The drafter at the setting that takes most memory; the others share its weights."""
        made = make_named(folder or NGRAM, drafter_options or DrafterOptions(), location.folder, say)(model)
        variants.extend(resized(made, setting) for setting in options.settings)
        if not variants:
            variants.append(made)
        return max(variants, key=lambda d: d.num_draft_tokens)

    running = replace(run_options or Options(), max_num_seqs=max(options.concurrency), seed=options.seed)
    llm = load(
        location.folder, running, drafter=None if drafter is None else largest, check=check, say=say, progress=loading,
    )  # fmt: skip
    distinct = {describe(d): d for d in variants}
    subjects: dict[str | None, Subject] = {None: InProcess(llm, options, None)}
    subjects |= {name: InProcess(llm, options, d) for name, d in distinct.items()}
    result = BenchResult(
        subject=str(checkpoint),
        drafter=None if drafter is None else str(drafter),
        options=asdict(options),
        machine={**machine(), **_running(llm)},
    )
    measure(result, subjects, tasks, options, progress, stop, on_cell)
    _advise(result, {name: run_flags(d) for name, d in distinct.items()})
    result.complete = True
    on_cell(result)
    return result


def bench_server(
    base_url: str,
    options: BenchOptions | None = None,
    *,
    baseline_url: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    timeout_s: float = 600.0,
    offline: bool = False,
    token: str | None = None,
    progress: ProgressCallback = ignore,
    stop: Callable[[], None] = lambda: None,
    on_cell: Callable[[BenchResult], None] = lambda result: None,
) -> BenchResult:
    """Measure an OpenAI-compatible server by streamed chat completions, and what it tells of its drafts.

    Args:
        base_url: its address, the one that ends in /v1.
        options: what is asked; settings of a drafter are the server's own affair.
        baseline_url: a server of the same model without drafts, for the speed-up.
        model: its name; None: the only one that the server has.
        api_key: sent to both.
        timeout_s: the longest silence of a request.
        offline: tasks come from the Hub's cache only.
        token: for the Hub.
        progress: takes snapshots of the measuring.
        stop: called often; what it raises ends the run.
        on_cell: called with the result so far whenever a part of it was measured.

    Raises:
        UsageError: options that cannot be.
        EnvironmentFault: no server, no request that was answered, or counters that do not fit each other.
    """
    from m27quant.bench.openai_client import Client
    from m27quant.bench.server import Server

    options = options or BenchOptions()
    if options.settings:
        raise UsageError("a server's drafter is set where it was started", hint="leave the settings out")
    clients = [Client(url, api_key, timeout_s) for url in (base_url, baseline_url) if url is not None]
    tasks = _tasks(options, offline, token)
    servers = [Server(client, options, model) for client in clients]
    subjects: dict[str | None, Subject] = {"as served": servers[0]}
    if baseline_url is not None:
        subjects = {None: servers[1], **subjects}
    result = BenchResult(
        subject=base_url,
        drafter=None,
        options={**asdict(options), "model": servers[0].model, "baseline_url": baseline_url},
        machine={"client": machine(), "server": servers[0].version()},
    )
    measure(result, subjects, tasks, options, progress, stop, on_cell)
    result.complete = True
    on_cell(result)
    return result


def _tasks(options: BenchOptions, offline: bool, token: str | None) -> list[Loaded]:
    tasks = [load_task(name, offline=offline, token=token) for name in options.tasks]
    if len({t.name for t in tasks}) != len(tasks):
        raise UsageError("two tasks have one name", hint="give their files different names")
    return tasks


def _advise(result: BenchResult, flags: Mapping[str, str]) -> None:
    result.advice = recommend(result.speeds(), flags)
    preempted = sum(cell.num_preemptions for cell in result.cells)
    if preempted:
        result.notices.append(
            f"{preempted} answers were put back for want of KV cache and computed anew: "
            "lower the concurrency or --max-tokens, or raise --max-memory"
        )


def _running(llm: LLM) -> dict[str, Any]:
    o = llm.options
    return {
        "device": str(llm.model.device),
        "activations": o.activations,
        "kv_cache_dtype": str(llm.engine.cache.shape.dtype).removeprefix("torch."),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "invariant": llm.model.invariant,
    }


def machine() -> dict[str, Any]:
    """What a figure has to be read with; no names of hosts or users."""
    found = describe_environment()
    versions = {name: found.packages.get(name) for name in ("torch", "triton", "transformers")}
    return {
        "m27quant": found.m27quant,
        "python": platform.python_version(),
        "system": found.system,
        "cpu": escape(found.cpu["model"]),
        "cpus": found.cpu["usable"],
        "gpus": [escape(device.name) for device in found.devices],
        "versions": versions,
    }
