"""Many clients at once, some of them bad: every answer is whole and right, every refusal an error object.

    python -m tests.serve.soak [--seconds 60] [--clients 64]

starts a server on tiny-m27 and prints what happened, with the server's memory at the beginning and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROMPTS = ("import os\n", "def main():\n    ", "class A:\n", "# ", "for i in range(", "x = [")
TOKENS = 12
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BAD: tuple[tuple[str, bytes, int], ...] = (
    (COMPLETIONS, b'{"prompt": "a", "max_tokens": -1}', 400),
    (COMPLETIONS, b'{"prompt": NaN}', 400),
    (COMPLETIONS, b"[" * 3000, 400),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400),
    (COMPLETIONS, b'{"prompt": "a", "model": "another"}', 404),
    (COMPLETIONS, b'{"prompt": [1, 99999999]}', 400),
    (COMPLETIONS, b"\xff\xfe", 400),
    (CHAT, b'{"messages": [{"role": "wizard", "content": "a"}]}', 400),
    (CHAT, b'{"messages": []}', 400),
    (CHAT, b"{}", 400),
    ("/v1/nothing", b"{}", 404),
    ("/health", b"{}", 405),
)


@dataclass
class Report:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """What should not have been."""


class Clients:
    """They know what each prompt's greedy answer is, and so whether theirs is the right one."""

    def __init__(self, address: str, seed: int = 0) -> None:
        parts = urlsplit(address)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port
        self._random = random.Random(seed)
        self.expected: dict[str, str] = {}
        self.report = Report()

    async def run(self, num_clients: int, seconds: float) -> Report:
        for prompt in PROMPTS:
            status, body = await self._exchange(COMPLETIONS, _body(prompt, stream=False))
            assert status == 200, body
            self.expected[prompt] = json.loads(body)["choices"][0]["text"]
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._client(end) for _ in range(num_clients)))
        return self.report

    async def _client(self, end: float) -> None:
        kinds = (self._whole, self._stream, self._leave_early, self._leave_midway, self._bad, self._garbage)
        while time.monotonic() < end:
            (kind,) = self._random.choices(kinds, weights=(3, 4, 1, 2, 3, 1))
            name = kind.__name__.strip("_")
            try:
                fault = await asyncio.wait_for(kind(), 120)
            except (OSError, EOFError, ValueError, KeyError, IndexError, TimeoutError) as broken:
                fault = f"{type(broken).__name__}: {broken}"
            self.report.outcomes[name] += 1
            if fault:
                self.report.faults.append(f"{name}: {fault}")

    async def _whole(self) -> str | None:
        prompt = self._random.choice(PROMPTS)
        status, body = await self._exchange(COMPLETIONS, _body(prompt, stream=False))
        if status in (429, 503):
            return _error_fault(body)
        text = json.loads(body)["choices"][0]["text"]
        return None if text == self.expected[prompt] else f"{prompt!r} was answered by {text!r}"

    async def _stream(self) -> str | None:
        prompt = self._random.choice(PROMPTS)
        status, body = await self._exchange(COMPLETIONS, _body(prompt, stream=True))
        if status in (429, 503):
            return _error_fault(body)
        events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
        if not events or events[-1] != "[DONE]":
            return f"a stream without end: {body[-200:]!r}"
        choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        text = "".join(choice["text"] for choice in choices)
        if choices[-1]["finish_reason"] != "length":
            return f"finished by {choices[-1]['finish_reason']}"
        return None if text == self.expected[prompt] else f"{prompt!r} was streamed {text!r}"

    async def _leave_early(self) -> str | None:
        """Ask for much, and go before anything came."""
        _, writer = await asyncio.open_connection(self._host, self._port)
        writer.write(_request(COMPLETIONS, _body("def ", stream=self._random.random() < 0.5, tokens=400)))
        await writer.drain()
        await asyncio.sleep(self._random.random() * 0.1)
        writer.transport.abort()
        return None

    async def _leave_midway(self) -> str | None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        writer.write(_request(COMPLETIONS, _body("def ", stream=True, tokens=400)))
        await reader.read(100)
        writer.transport.abort()
        return None

    async def _bad(self) -> str | None:
        path, body, expected = self._random.choice(BAD)
        status, answer = await self._exchange(path, body)
        if status != expected:
            return f"{path} {body[:60]!r} gave {status}, not {expected}"
        return _error_fault(answer)

    async def _garbage(self) -> str | None:
        """No HTTP at all."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        writer.write(self._random.randbytes(64) + b"\r\n\r\n")
        answer = await reader.read()
        writer.close()
        if not answer.startswith(b"HTTP/1.1 400"):
            return f"garbage was answered by {answer[:80]!r}"
        return _error_fault(answer.partition(b"\r\n\r\n")[2])

    async def _exchange(self, path: str, body: bytes) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(_request(path, body))
            head = await reader.readuntil(b"\r\n\r\n")
            raw = await reader.read()
        finally:
            writer.close()
        chunked = b"transfer-encoding: chunked" in head.lower()
        return int(head.split()[1]), _dechunked(raw) if chunked else raw


def _body(prompt: str, *, stream: bool, tokens: int = TOKENS) -> bytes:
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    return json.dumps(asked).encode()


def _request(path: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _dechunked(raw: bytes) -> bytes:
    parts = []
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        count = int(size, 16)
        parts.append(rest[:count])
        raw = rest[count + 2 :]
    return b"".join(parts)


def _error_fault(body: bytes) -> str | None:
    """What is wrong with an error object, if anything is."""
    try:
        error: dict[str, Any] = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"no error object: {body[:200]!r}"
    if set(error) != {"message", "type", "param", "code"} or not error["message"] or not error["type"]:
        return f"not a whole error object: {error}"
    return None


def _metric(address: str, name: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"m27quant:{name} ")).split()[1])


def main() -> None:
    import psutil

    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    args = parser.parse_args()
    # a cache so small that the beginning has touched all of it: what grows then is a leak
    command = [
        sys.executable, "-m", "m27quant", "serve", "examples/tiny-m27", "--engine", "builtin", "--port", "0",
        "--max-num-seqs", "16", "--max-model-len", "416",
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stderr is not None
        address = next(line.split()[-1] for line in process.stderr if "listening on http" in line)
        memory = psutil.Process(process.pid).memory_info
        asyncio.run(
            Clients(address, seed=1).run(args.clients, args.seconds / 6)
        )  # what is made once is there
        begin = memory().rss
        started = time.monotonic()
        report = asyncio.run(Clients(address, seed=2).run(args.clients, args.seconds))
        seconds = time.monotonic() - started
        time.sleep(2)
        end = memory().rss
        used, running = _metric(address, "kv_cache_usage_perc"), _metric(address, "num_requests_running")
        process.terminate()
    print(
        f"{sum(report.outcomes.values())} requests in {seconds:.0f} s: {dict(sorted(report.outcomes.items()))}"
    )
    print(
        f"memory {begin / 2**20:.1f} MiB before, {end / 2**20:.1f} MiB after; KV cache in use {used}, running {running}"
    )
    print(f"exit code {process.returncode}; faults: {report.faults[:10] or 'none'}")
    sys.exit(bool(report.faults or process.returncode or used or running))


if __name__ == "__main__":
    main()
