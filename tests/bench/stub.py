"""A server that keeps OpenAI's protocol and counts as vLLM or SGLang do, with answers made by rule."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STEPS = [0, 3, 1, 1, 0, 2]
"""Drafts accepted in each verify step of every answer; 3 are drafted in each."""
TOKENS = 1 + sum(a + 1 for a in STEPS)
DONE = b"data: [DONE]\n\n"
Events = list[Any]


@dataclass
class Behaviour:
    """What the server does; tests change it."""

    flavour: str = "plain"
    """vllm: counters; vllm-requests: per-request metrics, too; sglang: an average; sglang-usage: accepted tokens;
    m27quant: the usage block."""
    models: list[str] = field(default_factory=lambda: ["tiny"])
    key: str | None = None
    events: Callable[[Events], Events] = lambda events: events
    """Changes the events of an answer; bytes among them are written as they are."""
    fault: Callable[[int], tuple[int, Any] | None] = lambda number: None
    """(status, body) in place of the answer to the n-th chat request."""
    pause_s: float = 0.0
    others: int = 0
    """Answers of others beside each of ours."""


@dataclass
class Seen:
    """What has come in."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    in_flight: int = 0
    most_in_flight: int = 0
    drafts: int = 0
    lock: Any = field(default_factory=threading.Lock)


def answer_events(flavour: str) -> Events:
    """A first event with the role alone, a piece for each step, the reason, the usage."""
    pieces = [{"reasoning_content": "x"}, *({"content": "y" * (a + 1)} for a in STEPS)]
    chunks: Events = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    chunks += [{"choices": [{"index": 0, "delta": piece}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    usage: dict[str, Any] = {"prompt_tokens": 5, "completion_tokens": TOKENS, "total_tokens": 5 + TOKENS}
    last: dict[str, Any] = {"choices": [], "usage": usage}
    accepted, drafted = sum(STEPS), 3 * len(STEPS)
    details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
    if flavour == "m27quant":
        positions = [sum(a >= k for a in STEPS) for k in (1, 2, 3)]
        usage |= {"m27quant": {"verify_steps": len(STEPS), "accepted": positions}}
        usage |= {"completion_tokens_details": details}
    if flavour == "sglang-usage":
        usage |= {"completion_tokens_details": details}
    if flavour == "vllm-requests":
        histogram = {str(a): STEPS.count(a) for a in set(STEPS)}
        last["metrics"] = {
            "speculative_decoding": {"acceptance_histogram": histogram, "num_draft_tokens": drafted}
        }
    return [*chunks, last]


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[tuple[str, Seen]]:
    """The server's address and what it sees, while the block runs."""
    seen = Seen()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            flavour = behaviour.flavour
            if self.path == "/v1/models":
                self._send(200, {"object": "list", "data": [{"id": m} for m in behaviour.models]})
            elif self.path == "/metrics" and flavour.startswith("vllm"):
                n = seen.drafts
                positions = [n * sum(a >= k for a in STEPS) for k in (1, 2, 3)]
                lines = [f"vllm:spec_decode_num_drafts_total {n * len(STEPS)}"] * bool(n)
                lines += [f"vllm:spec_decode_num_draft_tokens_total {n * len(STEPS) * 3}"]
                lines += [f"vllm:spec_decode_num_accepted_tokens_total {n * sum(STEPS)}"]
                name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
                lines += [f'{name}{{position="{k}"}} {count}' for k, count in enumerate(positions)]
                lines += [f"vllm:generation_tokens_total {n * TOKENS}", ""]
                self._send(200, "\n".join(lines))
            elif self.path == "/get_server_info" and flavour == "sglang":
                self._send(200, {"internal_states": [{"avg_spec_accept_length": 2.25}]})
            else:
                self._send(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with seen.lock:
                number = len(seen.bodies)
                seen.bodies.append(body)
                seen.keys.add(self.headers["Authorization"])
                seen.in_flight += 1
                seen.most_in_flight = max(seen.most_in_flight, seen.in_flight)
            wanted = None if behaviour.key is None else f"Bearer {behaviour.key}"
            if wanted is not None and self.headers["Authorization"] != wanted:
                self._ended()
                self._send(401, {"error": {"message": "Incorrect API key"}})
            elif (fault := behaviour.fault(number)) is not None:
                self._ended()
                self._send(*fault)
            else:
                self._stream(behaviour.events(answer_events(behaviour.flavour)))

        def _ended(self) -> None:
            """Before the client can know: it may ask again at once."""
            with seen.lock:
                seen.in_flight -= 1

        def _stream(self, events: Events) -> None:
            with seen.lock:
                seen.drafts += 1 + behaviour.others
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in [*events, DONE]:
                time.sleep(behaviour.pause_s)
                if event is DONE or event == b"":
                    self._ended()
                data = event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode()
                if not data:
                    self.close_connection = True
                    return
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

        def _send(self, status: int, body: Any) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", body)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that hangs up is no fault of the test."""

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
