"""How ranks find each other: the first listens, the others call it; a secret keeps strangers out."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from m27quant.distributed.channel import Channel
from m27quant.distributed.ranks import ALONE, Peer, Ranks, introduction
from m27quant.errors import EnvironmentFault, UsageError

JOIN_S = 300
"""Seconds that ranks may take to come together: programs start at different speeds on many machines."""
GREETING_S = 10
KEY = "m27quant/meeting"
"""Where the first rank writes port and secret in the store that torchrun keeps."""
LOOPBACK = "127.0.0.1"


class Meeting:
    """The first rank's listening socket until everybody has come."""

    def __init__(self, address: str = LOOPBACK) -> None:
        self._server = socket.create_server((address, 0), backlog=1024)
        self._server.settimeout(0.2)
        self.port: int = self._server.getsockname()[1]
        self.secret = secrets.token_hex(16)

    def open(self, size: int, stop: Callable[[], None], local_size: int = 1) -> Ranks:
        """Wait for ranks 1 to `size` - 1.

        Raises:
            EnvironmentFault: they do not come.
        """
        peers: dict[int, Peer] = {}
        deadline = time.monotonic() + JOIN_S
        with self._server:
            while len(peers) < size - 1:
                stop()
                if time.monotonic() > deadline:
                    missing = [r for r in range(1, size) if r not in peers]
                    raise EnvironmentFault(
                        f"ranks {missing[:8]} of {size} did not come within {JOIN_S} seconds",
                        hint="see what they say; all ranks must be able to reach rank 0's machine",
                    )
                with suppress(TimeoutError):
                    connection, _ = self._server.accept()
                    peer = self._welcome(Channel(connection), connection, size)
                    if peer is not None and peer.rank not in peers:
                        peers[peer.rank] = peer
        return Ranks(0, size, peers, local_size)

    def _welcome(self, channel: Channel, connection: socket.socket, size: int) -> Peer | None:
        """A rank that knows the secret; anybody else is sent away."""
        try:
            connection.settimeout(GREETING_S)
            hello = channel.receive()
            connection.settimeout(None)
            rank, pid = hello["rank"], hello["pid"]
            known = hmac.compare_digest(str(hello["secret"]).encode(), self.secret.encode())
            if known and isinstance(rank, int) and isinstance(pid, int) and 0 < rank < size:
                channel.send(introduction(0))
                return Peer(rank, pid, str(hello["host"]), channel)
        except (OSError, ValueError, KeyError, RecursionError):
            pass
        channel.close()
        return None


def call(address: str, port: int, secret: str, rank: int, size: int, local_size: int = 1) -> Ranks:
    """Come to the first rank's meeting.

    Raises:
        EnvironmentFault: it cannot be reached.
    """
    channel: Channel | None = None
    try:
        channel = Channel(socket.create_connection((address, port), timeout=JOIN_S))
        channel.send({**introduction(rank), "secret": secret})
        host = channel.receive()
        first = Peer(0, int(host["pid"]), str(host["host"]), channel)
    except (OSError, ValueError, KeyError) as fault:
        if channel is not None:
            channel.close()
        raise EnvironmentFault(
            f"rank {rank} of {size} cannot reach rank 0 at {address} port {port}: {fault}",
            hint="all ranks must be able to reach rank 0's machine; is there a firewall between them?",
        ) from None
    return Ranks(rank, size, {0: first}, local_size)


def is_launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process as one of several."""
    return _number("WORLD_SIZE", 1) > 1


def join(stop: Callable[[], None] = lambda: None) -> Ranks:
    """The ranks that torchrun started; one where it started none.

    Raises:
        UsageError: its variables are not set, or not numbers.
        EnvironmentFault: they cannot reach each other.
    """
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        return ALONE
    rank, local_size = _number("RANK"), _number("LOCAL_WORLD_SIZE", 1)
    address = LOOPBACK if local_size == size else os.environ.get("MASTER_ADDR", "")
    from torch.distributed import DistError
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(
            rendezvous("env://", rank=rank, world_size=size, timeout=timedelta(seconds=JOIN_S))
        )
        if rank == 0:
            meeting = Meeting(_own_address(address))
            store.set(KEY, f"{meeting.port} {meeting.secret}")
            return meeting.open(size, stop, local_size)
        port, secret = store.get(KEY).decode().split()
    except (DistError, KeyError, ValueError) as fault:
        raise EnvironmentFault(
            f"the {size} ranks cannot reach each other: {fault}", hint="start them with torchrun"
        ) from None
    return call(address, int(port), secret, rank, size, local_size)


def _own_address(host: str) -> str:
    """The interface that other machines know this one by; all where it is not one of ours (address translation)."""
    try:
        with socket.create_server((host, 0)):
            return host
    except OSError:
        return ""


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UsageError(
            f"{name}={text!r} in the environment is no number", hint="start the ranks with torchrun"
        )
    return int(text)
