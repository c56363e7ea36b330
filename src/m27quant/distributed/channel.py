"""Messages between two processes: length-prefixed JSON over TCP.

JSON because nothing else is needed, cannot run code, and gives floats back to the bit.  A process that dies closes
its connections at once; a machine that dies is noticed by keep-alive within `LOST_S`.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

LOST_S = 30
"""Seconds after which a machine that does not answer counts as lost."""
MAX_MESSAGE = 256 * 2**20
_PREFIX = 4


class Channel:
    """One connection; one thread may read while any may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}.items():
            if hasattr(socket, name):  # macOS has its own
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_S * 1000)

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; raises `OSError` where the other side is gone."""
        data = json.dumps(message).encode()
        with self._sending:
            self._socket.sendall(len(data).to_bytes(_PREFIX, "big") + data)

    def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            OSError: the other side is gone.
            ValueError: what came is no message.
        """
        length = int.from_bytes(self._read(_PREFIX), "big")
        if length > MAX_MESSAGE:
            raise ValueError("a message that is too long")
        message = json.loads(self._read(length))
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        return message

    def messages(self) -> Iterator[dict[str, Any]]:
        """Every message until the other side is gone."""
        while True:
            try:
                yield self.receive()
            except (OSError, ValueError, RecursionError):
                return

    def close(self) -> None:
        """Hang up; a thread that reads gets to its end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._socket.recv(min(count, 2**20))
            if not part:
                raise ConnectionResetError("the other side is gone")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)
