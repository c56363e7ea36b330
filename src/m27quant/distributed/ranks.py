"""This process among those that quantize one model together, and what happens when one of them fails.

All ranks run the same program.  They meet in `gather`, through the first rank; between meetings a thread per
connection listens, so that a rank that fails or dies stops all others at their next look, wherever they are: no
timeout has to pass, and everybody knows which rank it was.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from m27quant import errors
from m27quant.distributed.channel import Channel
from m27quant.errors import EnvironmentFault, Interrupted, M27Error, escape

GOODBYE = "goodbye"
"""The last step of a rank that has done its part; nobody is there with it."""
LOOK_S = 0.1
"""Seconds between two looks at signals while waiting for others."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another rank, as it introduced itself."""

    rank: int
    pid: int
    host: str
    channel: Channel
    inbox: queue.SimpleQueue[dict[str, Any] | None] = field(default_factory=queue.SimpleQueue)
    """What it sent; None wakes who waits for it."""

    def __str__(self) -> str:
        return f"process {self.pid} on {escape(self.host)}"


def introduction(rank: int) -> dict[str, Any]:
    """How a rank presents itself to another."""
    return {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()}


class Ranks:
    """One of `size` processes; the first has channels to all others, which have one to it."""

    def __init__(
        self, rank: int = 0, size: int = 1, peers: Mapping[int, Peer] = {}, local_size: int = 1
    ) -> None:
        self.rank, self.size = rank, size
        self.local_size = local_size
        """Ranks on this machine, which share its memory."""
        self._peers = dict(peers)
        self._fault: M27Error | None = None
        self._guard = threading.Lock()
        self._over = False
        for peer in self._peers.values():
            name = f"rank-{peer.rank}"
            threading.Thread(target=self._listen, args=(peer,), name=name, daemon=True).start()

    @property
    def is_first(self) -> bool:
        """The rank that keeps the journal, and talks to the user."""
        return self.rank == 0

    @property
    def is_spokesman(self) -> bool:
        """Whether this rank says why all end: the first, or the second where the first is gone."""
        return self.rank == 0 or (self.rank == 1 and isinstance(self._fault, FirstIsGone))

    def part(self, count: int) -> range:
        """This rank's run of `count` things in order."""
        return range(-(-count * self.rank // self.size), -(-count * (self.rank + 1) // self.size))

    def owns(self, index: int) -> bool:
        """Whether the thing number `index` is this rank's, where they are dealt out one by one."""
        return index % self.size == self.rank

    # -- meeting --------------------------------------------------------------------------------

    def gather(self, step: str, value: Any, stop: Callable[[], None]) -> list[Any]:
        """Every rank's `value` (of JSON's types), in the order of ranks, once all have come to `step`.

        Raises:
            M27Error: a rank has failed; its class and exit code are those of the failure.
            Interrupted: from `stop`, which is called while waiting.
        """
        if self.size == 1:
            return [value]
        mine = {"step": step, "value": value}
        if self.is_first:
            came = [mine, *(self._next(self._peers[rank], step, stop) for rank in range(1, self.size))]
            everything = {"step": step, "value": [message["value"] for message in came]}
            for peer in self._peers.values():
                self._send(peer, everything)
            return list(everything["value"])
        self._send(self._peers[0], mine)
        return list(self._next(self._peers[0], step, stop)["value"])

    def share(self, step: str, value: Any, stop: Callable[[], None]) -> Any:
        """The first rank's `value`; the others' do not matter."""
        return self.gather(step, value if self.is_first else None, stop)[0]

    def check(self) -> None:
        """Raise where another rank has failed."""
        if self._fault is not None:
            raise self._fault

    def _next(self, peer: Peer, step: str, stop: Callable[[], None]) -> dict[str, Any]:
        while True:
            self.check()
            stop()
            try:
                message = peer.inbox.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if message is None:
                continue
            if message.get("step") != step:
                raise M27Error(
                    f"internal error: rank {peer.rank} is at '{escape(message.get('step'))}', "
                    f"rank {self.rank} at '{step}'"
                )
            return message

    def _send(self, peer: Peer, message: dict[str, Any]) -> None:
        try:
            peer.channel.send(message)
        except OSError:
            self._note(self._gone(peer))
            self.check()

    # -- failing --------------------------------------------------------------------------------

    def fail(self, fault: BaseException) -> None:
        """Tell the others why this rank ends, if they did not tell it."""
        with self._guard:
            if self._over or self._fault is not None:
                return
            self._over = True
        told = {"fault": {"rank": self.rank, **_described(fault)}}
        for peer in self._peers.values():
            with suppress(OSError):
                peer.channel.send(told)

    def say_goodbye(self) -> None:
        """Tell the others that this rank has done its part: that it hangs up is no death then."""
        with self._guard:
            if self._over or self._fault is not None:
                return
            self._over = True
        for peer in self._peers.values():
            with suppress(OSError):
                peer.channel.send({"step": GOODBYE})

    def close(self) -> None:
        """Hang up on all others; a death to them, unless they were told otherwise before."""
        with self._guard:
            self._over = True
        for peer in self._peers.values():
            peer.channel.close()

    def _listen(self, peer: Peer) -> None:
        """All that comes from one rank, until it hangs up."""
        for message in peer.channel.messages():
            if "fault" in message:
                self._note(_revived(message["fault"], self.size))
                return
            peer.inbox.put(message)
            if message.get("step") == GOODBYE:
                return
        self._note(self._gone(peer))

    def _note(self, fault: M27Error) -> None:
        """Remember the first fault, wake who waits, and pass it on."""
        with self._guard:
            if self._over or self._fault is not None:
                return
            self._fault = fault
        for peer in self._peers.values():
            peer.inbox.put(None)
        if self.is_first:
            told = {"fault": _described(fault)}
            for peer in self._peers.values():
                with suppress(OSError):
                    peer.channel.send(told)

    def _gone(self, peer: Peer) -> M27Error:
        kind = FirstIsGone if peer.rank == 0 else EnvironmentFault
        return kind(
            f"rank {peer.rank} of {self.size} ({peer}) is gone: it was killed, or its machine is lost",
            hint="was it out of memory? What is finished is kept: continue with --resume, on any number of ranks",
        )


class FirstIsGone(EnvironmentFault):
    """The rank that talks to the user has died."""


ALONE = Ranks()


def _described(fault: BaseException) -> dict[str, Any]:
    """A fault as a message; what is not of our tree is a bug, or what torch says of the machine."""
    if isinstance(fault, M27Error):
        kind, text = type(fault).__name__, fault.message
        return {"kind": kind, "message": text, "hint": fault.hint, "exit_code": fault.exit_code}
    if isinstance(fault, KeyboardInterrupt):
        return _described(Interrupted("stopped by SIGINT"))
    first = escape(str(fault).partition("\n")[0])
    return {
        "kind": "M27Error",
        "message": f"{type(fault).__name__}: {first}",
        "hint": None,
        "exit_code": M27Error.exit_code,
    }


def _revived(told: Mapping[str, Any], size: int) -> M27Error:
    """The fault of another rank as an exception of its class that says whose it is."""
    message, hint = escape(told.get("message"), 1000), told.get("hint")
    if isinstance(told.get("rank"), int):
        message = f"rank {told['rank']} of {size}: {message}"
    hint = None if hint is None else escape(hint, 1000)
    code = told.get("exit_code")
    kind = getattr(errors, str(told.get("kind")), M27Error)
    if kind is Interrupted and isinstance(code, int):
        return Interrupted(message, signum=code - 128, hint=hint)
    if not (isinstance(kind, type) and issubclass(kind, M27Error)):
        kind = M27Error
    return kind(message, hint=hint)
