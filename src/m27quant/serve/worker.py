"""One thread owns the model: answers are asked for through a queue, and what is new goes back to the event loop.

A step of the engine wakes the loop once, whatever the number of answers it was for.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from m27quant.errors import M27Error
from m27quant.runtime.api import LLM
from m27quant.runtime.generation import SamplingParams
from m27quant.runtime.sequence import Sequence, TokenLogprobs
from m27quant.serve.errors import ApiError, from_fault, server_fault
from m27quant.serve.metrics import Metrics

log = logging.getLogger("m27quant.serve")


class Piece(NamedTuple):
    """What a step added to an answer."""

    ticket: Ticket
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finished: Sequence | None
    """The whole request with its last piece; the engine does not touch it any more."""


class Mailbox:
    """Where a request's handler waits for pieces, or for the reason why none come."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._fault: ApiError | None = None
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._wake()

    def fail(self, fault: ApiError) -> None:
        """No more pieces, and why."""
        self._fault = self._fault or fault
        self._wake()

    def close(self) -> None:
        """Nobody reads the answer."""
        self._closed = True
        self._wake()

    async def take(self) -> list[Piece]:
        """Wait for what is new; empty when nobody reads.

        Raises:
            ApiError: as `fail` was told.
        """
        while not self._pieces:
            if self._closed:
                return []
            if self._fault is not None:
                raise self._fault
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        pieces, self._pieces = self._pieces, []
        return [] if self._closed else pieces

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(slots=True, eq=False)
class Ticket:
    """One answer that is wanted."""

    index: int
    """Among the request's choices."""
    prompt: list[int]
    params: SamplingParams
    mailbox: Mailbox
    streaming: bool
    """Pieces as they come; else all in one."""
    arrived: float = field(default_factory=time.perf_counter)
    sequence: Sequence | None = None
    num_chars: int = 0
    num_tokens: int = 0
    """Handed out; so many characters of text, too."""
    num_seen: int = 0
    """Tokens there were at `last`."""
    last: float = 0.0
    """When its newest token came."""


class Worker:
    """The engine's thread; all methods are called by the event loop's."""

    def __init__(self, llm: LLM, metrics: Metrics) -> None:
        self.llm, self.metrics = llm, metrics
        self.is_healthy = True
        """The engine's last step went well."""
        self.num_live = 0
        """Answers asked for and not finished."""
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._outbox: list[Piece] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; pieces go to mailboxes that `loop` reads."""
        self._loop = loop
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the step that it is at."""
        self._commands.put(None)
        self._thread.join(timeout_s)

    def submit(self, ticket: Ticket) -> None:
        """Queue an answer; its pieces come to its mailbox."""
        self.num_live += 1
        self._commands.put(lambda: self._submit(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Stop an answer that nobody waits for; nothing more comes of it."""
        self._commands.put(lambda: self._cancel(ticket))

    # The loop's side of what the thread hands out.

    def _deliver(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.finished is not None:
                self.num_live -= 1
            piece.ticket.mailbox.put(piece)

    def _refuse(self, ticket: Ticket, fault: ApiError) -> None:
        self.num_live -= 1
        ticket.mailbox.fail(fault)

    # The thread's side.

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # threads begin with a pool of their own
        while self._take_commands():
            try:
                changed = self.llm.step()
            except Exception:  # whatever it is, the clients have to hear of it
                log.exception("the engine failed")
                self.is_healthy = False
                self._fail_all(server_fault())
                continue
            self.is_healthy = True
            self._hand_out(changed)

    def _take_commands(self) -> bool:
        """Do what was asked for meanwhile; waits while there is nothing to compute.  False: it is over."""
        while True:
            idle = self.llm.engine.scheduler.is_idle
            if not idle and self._commands.empty():
                return True
            self._flush()
            command = self._commands.get()
            if command is None:
                self._fail_all(server_fault("the server was stopped"))
                return False
            command()

    def _submit(self, ticket: Ticket) -> None:
        try:
            sequence = self.llm.submit(ticket.prompt, ticket.params)
        except M27Error as fault:
            self._call(self._refuse, ticket, from_fault(fault))
            return
        sequence.timing.arrived = ticket.last = ticket.arrived
        ticket.sequence = sequence
        self._tickets[sequence.number] = ticket
        if sequence.finish_reason is not None:
            self._hand_out([sequence])

    def _cancel(self, ticket: Ticket) -> None:
        sequence = ticket.sequence
        if sequence is None or self._tickets.pop(sequence.number, None) is None:
            return
        self.llm.cancel(sequence)
        self.metrics.finished(sequence)
        self._call(self._refuse, ticket, server_fault("cancelled"))

    def _hand_out(self, changed: list[Sequence]) -> None:
        """What is new of each answer, in one message to the loop."""
        now = time.perf_counter()
        for sequence in changed:
            ticket = self._tickets[sequence.number]
            count = sequence.num_output - ticket.num_seen
            self.metrics.tokens(sequence, count, now - ticket.last, first=not ticket.num_seen)
            ticket.last, ticket.num_seen = now, sequence.num_output
            finished = sequence.finish_reason is not None
            if finished:
                del self._tickets[sequence.number]
                self.metrics.finished(sequence)
            if finished or ticket.streaming:
                self._outbox.append(_piece(ticket, sequence, finished))
        self._flush()

    def _flush(self) -> None:
        if self._outbox:
            pieces, self._outbox = self._outbox, []
            self._call(self._deliver, pieces)

    def _fail_all(self, fault: ApiError) -> None:
        tickets, self._tickets = list(self._tickets.values()), {}
        for ticket in tickets:
            assert ticket.sequence is not None
            self.llm.cancel(ticket.sequence)
            self.metrics.finished(ticket.sequence, failed=True)
            self._call(self._refuse, ticket, fault)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _piece(ticket: Ticket, sequence: Sequence, finished: bool) -> Piece:
    text = sequence.text.text if sequence.text is not None else ""
    piece = Piece(
        ticket,
        text[ticket.num_chars :],
        sequence.tokens[sequence.num_prompt + ticket.num_tokens :],
        sequence.logprobs[ticket.num_tokens :],
        sequence if finished else None,
    )
    ticket.num_chars, ticket.num_tokens = len(text), sequence.num_output
    return piece
