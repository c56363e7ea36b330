"""Who answers tasks: a model behind the builtin server for as long as it is asked, or a server that is there."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from m27quant.checkpoint.source import Source
from m27quant.errors import EnvironmentFault, UsageError, escape
from m27quant.evaluation.models import Model, speaking_of
from m27quant.evaluation.tasks import Endpoint, TaskPlan, run_tasks
from m27quant.runtime.load import load_llm
from m27quant.runtime.options import RunOptions
from m27quant.runtime.streamed import Precision

NAME = "candidate"
START_S = 60.0


@contextmanager
def served(
    source: Source, precision: Precision | None, *, device: torch.device, max_memory: int | None = None
) -> Iterator[Endpoint]:
    """Load a model and serve it on this machine alone, at a port that is free.

    Args:
        source: its layout checked.
        precision: of an NVFP4 checkpoint; None: of a reference.
        device: where.
        max_memory: bytes to stay within.

    Raises:
        EnvironmentFault: it does not fit, or the extra `serve` is not installed.
        CheckpointError: a weight that cannot be computed with.
    """
    from m27quant.serve.server import Server, ServerOptions, require_extra

    require_extra()
    options = RunOptions(
        activations=precision.activations if precision else "auto",
        kv_cache_dtype=precision.kv_cache if precision else "auto",
        device=str(device), max_memory=max_memory,
    )  # fmt: skip
    listening = threading.Event()
    llm = load_llm(source, options, alone=True)
    server = Server(llm, ServerOptions(port=0, chat_page=False), NAME, say=lambda line: listening.set())
    thread = threading.Thread(target=server.run, name="builtin server")
    thread.start()
    try:
        if not listening.wait(START_S):
            raise EnvironmentFault("the builtin server did not start")
        yield Endpoint(api=f"{server.address}/v1", model=NAME, tokenizer=source.folder)
    finally:
        server.stop()
        thread.join()
        del server, llm
        gc.collect()  # the next model wants the room


def tasks_of(
    source: Source,
    precision: Precision | None,
    plan: TaskPlan,
    *,
    device: torch.device,
    max_memory: int | None = None,
) -> dict[str, Any]:
    """A model's tasks through the builtin server; `not_measured` says why where it does not fit."""
    with ExitStack() as stack:
        try:
            endpoint = stack.enter_context(served(source, precision, device=device, max_memory=max_memory))
        except EnvironmentFault as fault:
            return {"not_measured": fault.message}
        return run_tasks(endpoint, plan)


def find_endpoint(base_url: str, tokenizer: Path) -> Endpoint:
    """A server that is there already, and the one model that it has.

    Raises:
        EnvironmentFault: it does not answer, or has no model.
        UsageError: not an address, or a server with several models.
    """
    from m27quant.bench.openai_client import Client

    client = Client(base_url)
    models = client.models()
    if len(models) != 1:
        shown = ", ".join(escape(name, 80) for name in models[:8]) or "none"
        raise UsageError(f"{escape(base_url)} should have one model, and has: {shown}")
    return Endpoint(api=client.api, model=models[0], tokenizer=tokenizer)


def measure_tasks(
    reference: Model,
    candidates: Sequence[Model],
    plan: TaskPlan,
    *,
    base_url: str | None,
    device: torch.device,
    max_memory: int | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
    stop: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Tasks of the reference, and of each candidate in each mode.

    `base_url` is a server with the only candidate, in whatever mode that server runs it; the reference is then not
    asked.
    """
    if base_url is not None:
        return None, [run_tasks(find_endpoint(base_url, candidates[0].source.folder), plan)]
    modes: list[tuple[Model, Precision | None]] = [(reference, None)]
    modes += [(model, precision) for model in candidates for precision in model.precisions]
    found = []
    for number, (model, precision) in enumerate(modes):
        stop()
        progress(number / len(modes))
        with speaking_of(model.name):
            found.append(tasks_of(model.source, precision, plan, device=device, max_memory=max_memory))
    return found[0], found[1:]


def check_server(base_url: str | None, candidates: Sequence[Model]) -> None:
    """Raise what stands against it before anything is computed: `EnvironmentFault` or `UsageError`."""
    if base_url is None:
        from m27quant.serve.server import require_extra

        require_extra()
    elif sum(len(model.precisions) for model in candidates) != 1:
        raise UsageError(
            "--base-url is one server, with one candidate in one mode", hint="evaluate one at a time"
        )
    else:
        find_endpoint(base_url, candidates[0].source.folder)
