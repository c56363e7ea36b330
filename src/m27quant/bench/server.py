"""A server as it is measured: a thread for each request in flight, acceptance from wherever it tells it."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Sequence

from m27quant.bench.counters import Counters, parse_counters, sglang_average, sglang_gauge
from m27quant.bench.inprocess import Watch
from m27quant.bench.openai_client import Client, Stopped
from m27quant.bench.reading import Acceptance, Answer, Reading
from m27quant.bench.requests import BenchOptions, Request
from m27quant.drafters.metrics import total
from m27quant.errors import EnvironmentFault, UsageError, escape

POLL_S = 0.05


class Server:
    """An OpenAI-compatible server."""

    def __init__(self, client: Client, options: BenchOptions, model: str | None = None) -> None:
        """Ask the server for its model where none is named.

        Raises:
            UsageError: it has several.
            EnvironmentFault: it cannot be reached, or has none.
        """
        self._client, self._options = client, options
        self.model = model if model is not None else _only_model(client)

    def run(self, requests: Sequence[Request], concurrency: int, watch: Watch) -> Reading:
        """Answer them all; a request that fails is counted, never repeated.

        Raises:
            EnvironmentFault: counters that do not fit each other.
        """
        before = self._counters()
        answers, seconds = self._answers(requests, concurrency, watch)
        acceptance, notices = self._acceptance(answers, before)
        return Reading(answers=answers, seconds=seconds, acceptance=acceptance, notices=notices)

    def version(self) -> str | None:
        """What vLLM and others state at /version, SGLang at /get_server_info; None where nothing is stated."""
        for path in ("/version", "/get_server_info"):
            try:
                found = json.loads(self._client.get(path))
            except (EnvironmentFault, ValueError, RecursionError):
                continue
            stated = found.get("version") if isinstance(found, dict) else None
            if isinstance(stated, str):
                return escape(stated, 80)
        return None

    def _answers(
        self, requests: Sequence[Request], concurrency: int, watch: Watch
    ) -> tuple[list[Answer], float]:
        waiting = deque(requests)
        answers: dict[int, Answer] = {}
        ended = threading.Event()
        stopped = threading.Event()

        def stop() -> None:
            if stopped.is_set():
                raise Stopped

        def work() -> None:
            while not stopped.is_set():
                try:
                    request = waiting.popleft()
                except IndexError:
                    return
                try:
                    answer = self._client.chat(request, self.model, self._options, stop)
                except Stopped:
                    return
                except Exception as fault:  # noqa: BLE001 - a thread that dies would leave the run waiting for ever
                    answer = Answer(error=f"internal error: {escape(f'{type(fault).__name__}: {fault}')}")
                answers[request.index] = answer
                ended.set()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(concurrency, len(requests)))]
        started = time.perf_counter()
        try:
            for thread in threads:
                thread.start()
            reported: set[int] = set()
            while len(reported) < len(requests):
                ended.wait(POLL_S)
                ended.clear()
                new = [index for index in list(answers) if index not in reported]
                reported.update(new)
                watch(len(new), sum(answers[index].output_tokens for index in new))
            for thread in threads:
                thread.join()
        finally:
            stopped.set()
        seconds = time.perf_counter() - started
        return [answers[request.index] for request in requests], seconds

    def _counters(self) -> Counters | None:
        try:
            return parse_counters(self._client.get("/metrics").decode("utf-8", "replace"))
        except EnvironmentFault:  # a server need not have any
            return None

    def _acceptance(
        self, answers: Sequence[Answer], before: Counters | None
    ) -> tuple[Acceptance, tuple[str, ...]]:
        """From the best source there is: the answers' own counts, counters of the whole server, an average."""
        good = [a for a in answers if a.error is None]
        per_answer = [a.stats for a in good if a.stats is not None]
        if good and len(per_answer) == len(good):
            return Acceptance(good[0].source, total(per_answer)), ()
        after = self._counters()
        if after is not None and after.num_drafts:
            return Acceptance("counters", after.since(before)), _others(answers, before, after)
        accepted = [a.accepted_tokens for a in good if a.accepted_tokens is not None]
        steps = sum(a.output_tokens - 1 for a in good) - sum(accepted)
        if good and len(accepted) == len(good) and steps > 0:
            return Acceptance("sglang usage", sums=(steps, sum(accepted))), ()
        average = self._average()
        return (Acceptance("sglang average", average=average) if average else Acceptance()), ()

    def _average(self) -> float | None:
        for path in ("/get_server_info", "/server_info"):
            try:
                found = sglang_average(self._client.get(path))
            except EnvironmentFault:
                continue
            if found is not None:
                return found
        try:
            return sglang_gauge(self._client.get("/metrics").decode("utf-8", "replace"))
        except EnvironmentFault:
            return None


def _others(answers: Sequence[Answer], before: Counters | None, after: Counters) -> tuple[str, ...]:
    """A line where the server answered more than was asked."""
    if after.generation_tokens is None:
        return ()
    ours = sum(a.output_tokens for a in answers)
    all_of_them = after.generation_tokens - ((before.generation_tokens or 0) if before else 0)
    if all_of_them <= ours or any(a.error for a in answers):
        return ()
    return (
        f"the server wrote {all_of_them:,.0f} tokens while {ours:,} were asked for: "
        "its counters hold the drafts of others too",
    )


def _only_model(client: Client) -> str:
    models = client.models()
    if not models:
        raise EnvironmentFault(
            f"{escape(client.base_url)} names no model", hint="pass --model, or the address that ends in /v1"
        )
    if len(models) > 1:
        shown = ", ".join(escape(m, 80) for m in models[:8])
        raise UsageError(f"the server has several models: {shown}", hint="choose one with --model")
    return models[0]
