"""What /openapi.json says of the paths: requests and answers are read and written by hand, so they are told here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from m27quant.serve.protocol import ChatRequest, CompletionRequest

PATHS = frozenset({"/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"})
REF = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MEANINGS = {
    400: "The request cannot be answered as it is",
    401: "No API key, or a wrong one",
    403: "The Host header names another machine",
    404: "No such model or path",
    405: "No such method",
    408: "Not finished in time",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The queue is full",
    503: "The server is ending",
}


def _faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    schema = {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}
    return {status: {"description": _MEANINGS[status], "content": schema} for status in statuses}


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _answer(kind: type[BaseModel], summary: str) -> dict[str, Any]:
    whole: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    return {
        "summary": summary,
        "openapi_extra": _body(kind),
        "responses": {
            200: {"description": "The answer, whole or as a stream", "content": whole},
            **_faults(400, 401, 403, 404, 405, 408, 413, 415, 429, 503),
        },
    }


HEALTH: dict[str, Any] = {"summary": "Whether the server takes requests", "responses": _faults(403, 405, 503)}
METRICS: dict[str, Any] = {
    "summary": "Figures for Prometheus",
    "responses": {
        200: {"description": "Text format 0.0.4", "content": {"text/plain": {}}},
        **_faults(403, 405),
    },
}
MODELS: dict[str, Any] = {"summary": "The model that is served", "responses": _faults(401, 403, 405, 503)}
MODEL: dict[str, Any] = {"summary": "One model", "responses": _faults(400, 401, 403, 404, 405, 503)}
CHAT = _answer(ChatRequest, "The assistant's next turn")
COMPLETION = _answer(CompletionRequest, "What goes on behind a text")


def describe(app: FastAPI) -> None:
    """Let the application's OpenAPI document have the schemas of what is not FastAPI's own."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            schemas["Error"] = ERROR
            for kind in (ChatRequest, CompletionRequest):
                schema = kind.model_json_schema(ref_template=REF)
                schemas |= schema.pop("$defs", {})
                schemas[kind.__name__] = schema
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
