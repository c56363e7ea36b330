"""`m27quant bench`: how fast a checkpoint or a server answers, and what a drafter is worth there."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m27quant.cli import bench_options as ask
from m27quant.cli import options as shared
from m27quant.cli import run_options as opt
from m27quant.cli.bench_view import tables
from m27quant.cli.files import forget, write_file
from m27quant.cli.output import Mode, Output
from m27quant.cli.progress import show
from m27quant.cli.stopping import graceful
from m27quant.errors import FindingsError, Interrupted, UsageError
from m27quant.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from m27quant.bench.result import BenchResult

QUIET_S = 3.0
"""Loading that takes no longer needs no progress."""

Measure = Callable[..., "BenchResult"]
"""Takes progress, stop, on_cell and loading."""


def bench(
    checkpoint: ask.Checkpoint = None,
    drafter: opt.DrafterOption = None,
    task: ask.Task = None,
    concurrency: ask.Concurrency = "1,32",
    num_prompts: ask.NumPrompts = None,
    repeat: ask.Repeat = 1,
    max_tokens: ask.MaxTokens = 4096,
    temperature: ask.Temperature = 0.0,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    thinking: opt.Thinking = True,
    seed: ask.Seed = 42,
    block_size: ask.BlockSize = None,
    num_draft_tokens: ask.NumDraftTokens = None,
    tree: ask.Tree = None,
    drafter_tap_offset: opt.TapOffset = None,
    drafter_rope_theta: opt.RopeTheta = None,
    base_url: ask.BaseUrl = None,
    baseline_url: ask.BaselineUrl = None,
    api_key: ask.ApiKey = None,
    model: ask.ModelName = None,
    timeout: ask.Timeout = 600.0,
    device: shared.Device = "auto",
    dtype: opt.Dtype = "bfloat16",
    activations: opt.Activations = "auto",
    kv_cache_dtype: opt.KvCacheDtype = "auto",
    invariant: opt.Invariant = None,
    max_memory: shared.MaxMemory = None,
    max_model_len: opt.MaxModelLen = None,
    no_verify: opt.NoVerify = False,
    revision: shared.Revision = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    output_format: ask.OutputFormat = "human",
    output_file: ask.OutputFile = None,
    plot: ask.Plot = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
    no_progress: shared.NoProgress = False,
) -> None:
    """Measure tokens/s and acceptance on the tasks of the drafters' cards, with a drafter and without it.

    Everything is measured side by side in one run, behind a warm-up of as many requests as are in flight.  Settings
    of the drafter are compared and one is recommended, or none where drafting does not pay.  What each figure
    counts stands in docs/metrics.md.  Ctrl-C ends the run; the tasks and concurrencies measured so far are shown.

    Examples:
      m27quant bench ./m27-nvfp4 --drafter ./m27-dflash --task math500 --task gsm8k --concurrency 1,32

      m27quant bench ./m27-nvfp4 --drafter ./m27-dflash --block-size 4,8,16 --plot sweep.svg

      m27quant bench ./m27-nvfp4 --drafter ./m27-eagle3 --tree 3/4/8,5/4/16 --num-draft-tokens 3 --task mt-bench

      m27quant bench --base-url http://127.0.0.1:8000/v1 --task math500=test.jsonl --format markdown -o table.md
    """
    kind = _kind(output_format, json)
    output = Output.open(json=kind == "json", quiet=quiet, verbose=verbose)
    for file in (output_file, plot):
        if file is not None:
            forget(file)
    # Read when torch's thread pool is loaded: threads that spin at barriers make a shared machine crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    server = {
        "--baseline-url": baseline_url, "--model": model,
        "--api-key": None if os.environ.get("M27QUANT_API_KEY") else api_key,
    }  # fmt: skip
    local = {
        "CHECKPOINT": checkpoint, "--drafter": drafter, "--block-size": block_size,
        "--num-draft-tokens": num_draft_tokens, "--tree": tree, "--drafter-tap-offset": drafter_tap_offset,
        "--drafter-rope-theta": drafter_rope_theta, "--max-memory": max_memory, "--max-model-len": max_model_len,
        "--invariant": invariant, "--revision": revision,
    }  # fmt: skip
    _refuse_mixed(base_url, local, server)
    from m27quant.bench.requests import BenchOptions
    from m27quant.bench.run import bench_checkpoint, bench_server

    options = BenchOptions(
        tasks=tuple(task or ("math500",)), concurrency=concurrency, num_prompts=num_prompts, max_tokens=max_tokens,
        temperature=temperature, top_p=top_p, top_k=top_k, thinking=thinking, seed=seed, repeat=repeat,
        settings=(*(block_size or ()), *(num_draft_tokens or ()), *(tree or ())),
    )  # fmt: skip
    hub: dict[str, Any] = {"offline": offline, "token": token.reveal() if token else None}

    def measure(loading: Callable[[int, int], None], **watching: Any) -> BenchResult:
        if base_url is not None:
            return bench_server(
                base_url, options, baseline_url=baseline_url, model=model, timeout_s=timeout,
                api_key=api_key.reveal() if api_key else None, **hub, **watching,
            )  # fmt: skip
        from m27quant.runtime.options import RunOptions

        assert checkpoint is not None
        running = RunOptions(
            activations=activations,  # type: ignore[arg-type]  # RunOptions refuses others by name
            kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            device=device, invariant=invariant, max_memory=max_memory, max_model_len=max_model_len,
        )  # fmt: skip
        return bench_checkpoint(
            checkpoint, options, drafter=drafter,
            drafter_options=_drafting(drafter_tap_offset, drafter_rope_theta), run_options=running,
            check=not no_verify, revision=revision, say=output.status, loading=loading, **hub, **watching,
        )  # fmt: skip

    result, fault = _measured(output, measure, enabled=not no_progress)
    _give(output, result, kind, output_file, plot)
    if fault is not None:
        raise fault
    if result.num_errors:
        raise FindingsError(
            f"{result.num_errors} of {sum(c.num_requests for c in result.cells)} requests failed; "
            "figures are of the others",
            hint="the lines that begin with `failed` say why",
        )


def _kind(output_format: str, json: bool) -> str:
    if json and output_format not in ("human", "json"):
        raise UsageError(f"--json and --output-format {output_format} exclude each other")
    return "json" if json else output_format


def _refuse_mixed(base_url: str | None, local: dict[str, Any], server: dict[str, Any]) -> None:
    if base_url is None:
        if local["CHECKPOINT"] is None:
            raise UsageError("nothing to measure", hint="name a checkpoint, or a server with --base-url")
        stray = [name for name, value in server.items() if value is not None]
        if stray:
            raise UsageError(
                f"{' and '.join(stray)} for a server, but no server", hint="name it with --base-url"
            )
        return
    stray = [name for name, value in local.items() if value is not None]
    if stray:
        raise UsageError(
            f"{' and '.join(stray)} with --base-url: a server has its own checkpoint and settings",
            hint="leave either out",
        )


def _drafting(tap_offset: str | None, rope_theta: float | None) -> Any:
    from m27quant.runtime.speculative.load import DrafterOptions

    return DrafterOptions(tap_offset=opt.tap_offset(tap_offset), rope_theta=rope_theta)


def _measured(output: Output, measure: Measure, *, enabled: bool) -> tuple[BenchResult, Interrupted | None]:
    """The result; where a signal came, what was measured before it, and the fault to end with.

    Raises:
        Interrupted: there is nothing yet.
    """
    so_far: list[BenchResult] = []
    try:
        with graceful(output, "") as stop, _phases(output, enabled, stop) as (loading, progress):
            return measure(loading, progress=progress, stop=stop, on_cell=so_far.append), None
    except Interrupted as fault:
        message = fault.message.partition(";")[0]
        signum = fault.exit_code - 128
        if not so_far:
            raise Interrupted(f"{message}; nothing was measured yet", signum=signum) from None
        return so_far[-1], Interrupted(
            f"{message}; what was measured is shown, one that was being measured is left out", signum=signum
        )


@contextmanager
def _phases(
    output: Output, enabled: bool, stop: Callable[[], None]
) -> Iterator[tuple[Callable[[int, int], None], ProgressCallback]]:
    """Two shows, one after the other: loading, then measuring, each with an ETA of its own."""
    with ExitStack() as stack:
        listeners: dict[str, ProgressCallback] = {}
        begun = time.monotonic()

        def tell(phase: str, snapshot: Progress) -> None:
            if phase not in listeners:
                stack.close()
                listeners[phase] = stack.enter_context(show(output, enabled=enabled))
            listeners[phase](snapshot)

        def loading(done: int, total: int) -> None:
            stop()
            if time.monotonic() - begun > QUIET_S:
                tell(
                    "loading", Progress(stage="loading", fraction=done / total, layer=done, num_layers=total)
                )

        yield loading, lambda snapshot: tell("measuring", snapshot)


def _give(
    output: Output, result: BenchResult, kind: str, output_file: Path | None, plot: Path | None
) -> None:
    from m27quant.bench.plot import draw
    from m27quant.bench.render import lines

    if plot is not None and result.cells:
        write_file(plot, draw(result).encode())
        output.status(f"drawn in {plot}")
    if output_file is not None:
        write_file(output_file, _text(result, kind).encode())
        output.status(f"written to {output_file}")
        return
    bare = "\n".join(lines(result))
    if kind == "markdown":
        text = _text(result, kind).rstrip("\n")
        output.result({}, human=text, quiet=text)
    else:
        output.result(result.to_json(), human=tables(result), quiet=bare)


def _text(result: BenchResult, kind: str) -> str:
    """The result as a file has it."""
    if kind == "markdown":
        from m27quant.bench.render import markdown

        return markdown(result)
    stream = io.StringIO()
    mode = Mode.JSON if kind == "json" else Mode.HUMAN
    Output(mode, stdout=stream).result(result.to_json(), human=tables(result))
    return stream.getvalue()
