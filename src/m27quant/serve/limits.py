"""How the server may be used: its options, and what bounds a request."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from m27quant.errors import UsageError, escape
from m27quant.serve.errors import ApiError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Everything about the server but the model; how many answers run at once is `RunOptions.max_num_seqs`."""

    host: str = "127.0.0.1"
    """The address to bind; other machines reach only what is not loopback."""
    port: int = 8000
    """0 takes a free one."""
    api_key: str | None = None
    """What clients have to send under /v1; None: nothing."""
    served_model_name: str | None = None
    """The model's name in requests; None: the checkpoint folder's name."""
    max_queue: int = 256
    """Answers that may wait beside those that run; further requests get 429."""
    max_body_bytes: int = 16 * 2**20
    """Of a request."""
    max_tokens: int | None = None
    """The most tokens of one answer; None: as many as the model's context holds."""
    max_choices: int = 64
    """The most answers of one request: n times the number of prompts."""
    request_timeout_s: float = 3600.0
    """Seconds from a request's arrival to the end of its answer."""
    body_timeout_s: float = 30.0
    """Seconds that the body of a request may take to arrive."""
    drain_timeout_s: float = 600.0
    """Seconds that answers have to finish in after SIGTERM."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may use the server; * for all."""
    chat_page: bool = True
    """Serve the chat page at /."""

    def __post_init__(self) -> None:
        """Raise `UsageError` naming the field that cannot be."""
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port must be from 0 to 65535, got {self.port}")
        for name, least in (("max_queue", 0), ("max_body_bytes", 1), ("max_choices", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")
        for name in ("request_timeout_s", "body_timeout_s", "drain_timeout_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, got {getattr(self, name)}")
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
            raise UsageError("an API key has to be printable ASCII without blanks, and not empty")

    @property
    def is_loopback(self) -> bool:
        """Only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


async def read_body(receive: Receive, headers: dict[bytes, bytes], options: ServerOptions) -> bytes:
    """A request's body.

    Raises:
        ApiError: too large (413), too slow (408), gone, or said to be something other than JSON (415).
    """
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":  # which a web page of another origin cannot send without being asked
        raise ApiError(
            415,
            f"the body's content type must be application/json, not '{escape(kind.decode('latin-1'))}'",
            code="unsupported_media_type",
        )
    try:
        async with asyncio.timeout(options.body_timeout_s):
            return await _collect(receive, headers.get(b"content-length", b""), options.max_body_bytes)
    except TimeoutError:
        raise ApiError(
            408,
            f"the request's body did not arrive within {options.body_timeout_s:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None


async def _collect(receive: Receive, declared: bytes, limit: int) -> bytes:
    too_large = ApiError(
        413,
        f"the request's body has more than {limit:,} bytes",
        code="request_too_large",
        headers={"Connection": "close"},
    )
    if declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client went away", code="client_disconnected")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
