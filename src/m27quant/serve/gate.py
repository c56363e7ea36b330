"""Before every path: the host, the key, and no more work once the server is ending."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m27quant.serve.errors import ApiError, draining, unauthorized
from m27quant.serve.limits import LOOPBACK_NAMES
from m27quant.serve.openapi import PATHS

if TYPE_CHECKING:
    from m27quant.serve.app import Service


class Gate:
    """The application behind it sees only what may pass."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        options = service.options
        self._key = None if options.api_key is None else options.api_key.encode()
        # a page that makes its name point here must not reach a server that needs no key
        self._hosts = {*LOOPBACK_NAMES, options.host} if options.is_loopback else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service = self._service
        service.num_requests += 1
        status = 499  # the client went away before there was one

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            fault = self._refusal(scope)
            if fault is not None:
                await error_response(fault)(scope, receive, note)
            else:  # uvicorn leaves out the body that a HEAD must not have
                seen = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
                await self._app(seen, receive, note)
        finally:
            service.num_requests -= 1
            path = scope["path"] if scope["path"] in PATHS else "other"
            service.worker.metrics.responses[(path, status)] += 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._hosts is not None and _host(headers.get(b"host", b"")) not in self._hosts:
            return ApiError(403, "the Host header names another machine", code="wrong_host")
        if scope["path"].startswith("/v1/"):
            if scope["method"] != "OPTIONS" and not self._knows(headers.get(b"authorization", b"")):
                return unauthorized()
            if self._service.is_draining:
                return draining()
        return None

    def _knows(self, sent: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, key = sent.partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


def _host(header: bytes) -> str:
    """Without the port."""
    text = header.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def error_response(fault: ApiError) -> Response:
    """The error object and its status."""
    return Response(fault.body(), fault.status, fault.headers, media_type="application/json")
