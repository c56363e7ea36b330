"""One streamed chat completion over plain HTTP, and small documents beside it; nothing is tried twice.

What a server sends is not trusted: lines and documents are bounded, redirects refused, messages shown escaped.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from m27quant.bench.reading import Answer, Source
from m27quant.bench.requests import BenchOptions, Request
from m27quant.drafters.metrics import AcceptanceStats
from m27quant.errors import EnvironmentFault, M27Error, UsageError, escape

MAX_LINE_BYTES = 4 * 2**20
MAX_DOCUMENT_BYTES = 64 * 2**20
SHOWN = 160
"""Characters of a server's own words."""


class Stopped(Exception):
    """Nobody wants a request's answer any more: the whole benchmark was told to end."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for the server that was named, and a POST that becomes a GET measures nothing."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Client:
    """A server by its address, the one that ends in /v1 as OpenAI's clients take it."""

    base_url: str
    api_key: str | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        """Raise `UsageError` where the address is none, or the key none that a header can hold."""
        if self.api_key is not None and re.fullmatch(r"[!-~]+", self.api_key, re.ASCII) is None:
            raise UsageError(
                "the API key has characters that keys do not have", hint="is there a line break in it?"
            )
        if "@" in self.base_url.partition("//")[2].partition("/")[0]:
            raise UsageError(
                "the address holds a name or a password, which results would show", hint="pass --api-key"
            )
        try:
            parts = urlsplit(self.base_url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good or not self.base_url.isprintable() or " " in self.base_url:
            raise UsageError(
                f"{escape(self.base_url)} is not the address of a server",
                hint="write http://127.0.0.1:8000/v1",
            )

    @property
    def api(self) -> str:
        """Where /models and /chat/completions are: below /v1, where the address names no folder."""
        base = self.base_url.rstrip("/")
        return base if urlsplit(base).path else f"{base}/v1"

    @property
    def root(self) -> str:
        """Where /metrics and the like are."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    def get(self, path: str) -> bytes:
        """A document below the root.

        Raises:
            EnvironmentFault: no server, or it does not have the document.
        """
        return self._get(f"{self.root}{path}")

    def models(self) -> list[str]:
        """What GET /models names; raises `EnvironmentFault`."""
        url = f"{self.api}/models"
        data = _object(self._get(url)).get("data")
        names = [m.get("id") for m in data if isinstance(m, Mapping)] if isinstance(data, list) else []
        return [name for name in names if isinstance(name, str)]

    def _get(self, url: str) -> bytes:
        try:
            with self._open(url, None, timeout_s=min(self.timeout_s, 60.0)) as response:
                body: bytes = response.read(MAX_DOCUMENT_BYTES + 1)
        except (OSError, http.client.HTTPException, ValueError) as fault:
            raise EnvironmentFault(
                f"{escape(url)}: {fault_words(fault)}", hint="is the server up, and its address right?"
            ) from None
        if len(body) > MAX_DOCUMENT_BYTES:
            raise EnvironmentFault(f"{escape(url)}: longer than {MAX_DOCUMENT_BYTES:,} bytes")
        return body

    def _open(self, url: str, body: bytes | None, *, timeout_s: float) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "m27quant-bench"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        opener = urllib.request.build_opener(_NoRedirect)
        return opener.open(urllib.request.Request(url, body, headers), timeout=timeout_s)

    def chat(
        self,
        request: Request,
        model: str,
        options: BenchOptions,
        watch: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Ask, and read the stream to its end; whatever goes wrong is the answer's error.

        Args:
            request: messages and seed.
            model: its name for the server.
            options: sampling and length.
            watch: called with every event; may raise `Stopped`, which is let through.
        """
        body = json.dumps(chat_body(request, model, options)).encode()
        url = f"{self.api}/chat/completions"
        stream = _Stream(time.perf_counter())
        try:
            with self._open(url, body, timeout_s=self.timeout_s) as response:
                for data in _events(response):
                    watch()
                    stream.take(data, time.perf_counter())
        except (OSError, http.client.HTTPException, ValueError, M27Error) as fault:
            words = fault_words(fault)
            return Answer(error=words if self.api_key is None else words.replace(self.api_key, "***"))
        return stream.answer()


def chat_body(request: Request, model: str, options: BenchOptions) -> dict[str, Any]:
    """The request as OpenAI's interface has it; chat_template_kwargs is vLLM's, SGLang's and ours."""
    sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    return {
        "model": model,
        "messages": request.messages,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": options.thinking},
        **{name: value for name, value in sampling.items() if value is not None},
    }


def fault_words(fault: BaseException) -> str:
    """What went wrong with a request, in one line that counts equal faults as one."""
    if isinstance(fault, urllib.error.HTTPError):
        try:
            said = _message(fault.read(MAX_LINE_BYTES))
        except (OSError, http.client.HTTPException, ValueError):
            said = ""
        return f"HTTP {fault.code}{f': {said}' if said else ''}"
    if isinstance(fault, M27Error):
        return fault.message
    reason = getattr(fault, "reason", fault)
    if isinstance(reason, TimeoutError):
        return "timed out"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return escape(f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason, SHOWN)


def _message(body: bytes) -> str:
    """An error document's own words."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return escape(body.decode("utf-8", "replace").strip(), SHOWN)
    error = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(error, dict):
        error = error.get("message", error)
    return escape(error, SHOWN)


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """The JSON of each `data:` line of a stream of server-sent events, up to `[DONE]`."""
    while line := response.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise EnvironmentFault(f"an event is longer than {MAX_LINE_BYTES:,} bytes")
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        yield _object(data)
    raise EnvironmentFault("the stream ended without [DONE]")


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise EnvironmentFault("the server sent what is not JSON") from None
    if not isinstance(found, dict):
        raise EnvironmentFault("the server sent JSON that is not an object")
    return found


class _Stream:
    """What the events of one answer say."""

    def __init__(self, sent: float) -> None:
        self._sent = sent
        self._first: float | None = None
        self._last = sent
        self._reason: str | None = None
        self._usage: dict[str, Any] | None = None
        self._stats: tuple[Source, AcceptanceStats] | None = None

    def take(self, event: dict[str, Any], now: float) -> None:
        """One event.

        Raises:
            EnvironmentFault: it is an error, or counts that cannot be.
        """
        if event.get("error") is not None:
            raise EnvironmentFault(f"error in the stream: {_message(json.dumps(event).encode())}")
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, Mapping):
                continue
            delta = choice.get("delta")
            if isinstance(delta, Mapping) and any(delta.get(key) for key in TEXTS):
                self._first = self._first or now
                self._last = now
            if isinstance(reason := choice.get("finish_reason"), str):
                self._reason = escape(reason, 32)
        if isinstance(usage := event.get("usage"), dict):
            self._usage = usage
        self._stats = _stats(event) or self._stats

    def answer(self) -> Answer:
        """The outcome, once the stream has ended."""
        tokens = _count(self._usage, "completion_tokens")
        if self._usage is None or tokens is None:
            return Answer(error="the server sent no usage, though stream_options.include_usage asked for it")
        details = self._usage.get("completion_tokens_details")
        first = self._first
        return Answer(
            prompt_tokens=_count(self._usage, "prompt_tokens") or 0,
            output_tokens=tokens,
            finish_reason=self._reason,
            ttft_s=None if first is None else first - self._sent,
            itl_s=None if first is None or tokens < 2 else (self._last - first) / (tokens - 1),
            source="none" if self._stats is None else self._stats[0],
            stats=None if self._stats is None else self._stats[1],
            accepted_tokens=_count(details, "accepted_prediction_tokens"),
        )


TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls")
"""Parts of a delta that come of tokens; the first event of many servers has a role only."""


def _stats(event: Mapping[str, Any]) -> tuple[Source, AcceptanceStats] | None:
    """Verify steps of the answer, where an event tells them."""
    usage, extra = event.get("usage"), event.get("metrics")
    if isinstance(usage, Mapping) and isinstance(ours := usage.get("m27quant"), Mapping):
        steps, accepted = _count(ours, "verify_steps") or 0, _counts(ours.get("accepted"))
        return "usage", AcceptanceStats.of_positions(steps, accepted, _drafted(usage))
    if isinstance(extra, Mapping) and isinstance(vllm := extra.get("speculative_decoding"), Mapping):
        histogram = vllm.get("acceptance_histogram")
        if isinstance(histogram, Mapping):  # {"0": steps, "2": steps}
            sparse = {int(k): v for k, v in histogram.items() if re.fullmatch(r"\d{1,3}", str(k), re.ASCII)}
            histogram = [sparse.get(a, 0) for a in range(max(sparse, default=-1) + 1)]
        drafted = _count(vllm, "num_draft_tokens") or 0
        return "vllm usage", AcceptanceStats.of_histogram(_counts(histogram), drafted)
    return None


def _drafted(usage: Mapping[str, Any]) -> int:
    details = usage.get("completion_tokens_details")
    names = ("accepted_prediction_tokens", "rejected_prediction_tokens")
    return sum(_count(details, name) or 0 for name in names)


def _count(document: Any, name: str) -> int | None:
    value = document.get(name) if isinstance(document, Mapping) else None
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40):
        return value
    raise EnvironmentFault(f"the server's {name} is {escape(value, 32)}, no count")


def _counts(values: Any) -> list[int]:
    if not isinstance(values, list) or len(values) > 4096:
        raise EnvironmentFault("the server's counts of accepted drafts are no list")
    return [_count({"accepted": value}, "accepted") or 0 for value in values]
