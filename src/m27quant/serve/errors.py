"""Errors as OpenAI's clients expect them: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from m27quant.errors import CheckpointError, M27Error, UsageError


class ApiError(Exception):
    """A request that gets no answer; `status` is HTTP's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def document(self) -> dict[str, Any]:
        """The body, as JSON has it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """ASCII, so that whatever the message quotes can be sent."""
        return json.dumps(self.document()).encode()


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def from_fault(fault: M27Error, *, param: str | None = None) -> ApiError:
    """What the runtime says of a request; a fault that is not the request's own is a 500."""
    message = fault.message if fault.hint is None else f"{fault.message}: {fault.hint}"
    if isinstance(fault, UsageError | CheckpointError):
        return invalid(message, param=param)
    return server_fault(message)


def not_found(message: str, *, code: str | None = None, param: str | None = None) -> ApiError:
    """404."""
    return ApiError(404, message, kind="not_found_error", code=code, param=param)


def unauthorized() -> ApiError:
    """401: no API key, or another one."""
    return ApiError(
        401,
        "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
        kind="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def overloaded(retry_after_s: int) -> ApiError:
    """429: the queue is full."""
    return ApiError(
        429,
        f"the queue is full; try again in {retry_after_s} s",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(retry_after_s)},
    )


def draining() -> ApiError:
    """503: the server finishes what it has begun, then ends."""
    return ApiError(
        503,
        "the server is shutting down",
        kind="service_unavailable_error",
        code="shutting_down",
        headers={"Connection": "close", "Retry-After": "5"},
    )


def timed_out(seconds: float) -> ApiError:
    """408: the answer was not finished in time."""
    return ApiError(408, f"not finished within {seconds:g} s", kind="timeout_error", code="request_timeout")


def server_fault(message: str = "internal error; the server's log tells more") -> ApiError:
    """500: a fault that is not the request's."""
    return ApiError(500, message, kind="server_error", code="internal_error")
