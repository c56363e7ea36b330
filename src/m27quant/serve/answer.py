"""One request on its way: answers asked of the worker, their pieces sent on, all of it stopped when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from m27quant.runtime.sequence import Sequence as Running
from m27quant.serve.errors import ApiError, overloaded, timed_out
from m27quant.serve.forms import DONE, Form, to_json
from m27quant.serve.limits import ServerOptions
from m27quant.serve.worker import Mailbox, Piece, Ticket, Worker

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that collects what it passes on would undo the stream
]


class Answer(Response):
    """An ASGI response that computes while it is sent."""

    def __init__(
        self, worker: Worker, options: ServerOptions, form: Form, tickets: Sequence[Ticket], mailbox: Mailbox
    ) -> None:
        super().__init__()
        self._worker, self._options, self._form = worker, options, form
        self._tickets, self._mailbox = tickets, mailbox
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        done = False
        try:
            for ticket in self._tickets:
                self._worker.submit(ticket)
            async with asyncio.timeout(self._options.request_timeout_s):
                done = await (self._stream(send) if self._form.asked.stream else self._whole(send))
        except TimeoutError:
            await self._fail(send, timed_out(self._options.request_timeout_s))
        except ApiError as fault:
            await self._fail(send, fault)
        finally:
            watch.cancel()
            if not done:
                for ticket in self._tickets:
                    self._worker.cancel(ticket)

    async def _watch(self, receive: Receive) -> None:
        """Nothing more comes from the client but its end."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._mailbox.close()

    async def _stream(self, send: Send) -> bool:
        form, finished = self._form, list[Running]()
        while len(finished) < len(self._tickets):
            pieces = await self._mailbox.take()
            if not pieces:
                return False
            text = "".join([form.chunks(piece) for piece in pieces])
            finished += [piece.finished for piece in pieces if piece.finished is not None]
            if not self._has_begun:
                self._has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            if text:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        end = form.last_chunk(finished).encode() + DONE
        await send({"type": "http.response.body", "body": end, "more_body": False})
        return True

    async def _whole(self, send: Send) -> bool:
        pieces: list[Piece] = []
        while len(pieces) < len(self._tickets):
            new = await self._mailbox.take()
            if not new:
                return False
            pieces += new
        await _send_json(send, 200, to_json(self._form.document(pieces)).encode())
        return True

    async def _fail(self, send: Send, fault: ApiError) -> None:
        """In a stream that has begun the fault is its last event."""
        if not self._has_begun:
            await _send_json(send, fault.status, fault.body(), fault.headers)
            return
        body = b"data: " + fault.body() + b"\n\n" + DONE
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def _send_json(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    lines = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    lines += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def refuse_overload(worker: Worker, options: ServerOptions, wanted: int) -> None:
    """Raise 429 where the queue has no room for so many answers more."""
    if worker.num_live + wanted > most_live(worker, options):
        raise overloaded(retry_after(worker))


def most_live(worker: Worker, options: ServerOptions) -> int:
    """Answers that may run or wait at a time."""
    return worker.llm.options.max_num_seqs + options.max_queue


def retry_after(worker: Worker) -> int:
    """Seconds after which an answer of the queue will have ended, going by those before."""
    latency = worker.metrics.request_latency
    count = sum(latency.counts)
    rounds = worker.num_live / worker.llm.options.max_num_seqs
    return max(1, min(60, round(rounds * latency.total / count))) if count else 1
