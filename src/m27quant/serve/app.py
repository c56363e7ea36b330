"""The application: what each path does with a request."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import m27quant
from m27quant.errors import UsageError, escape
from m27quant.runtime.api import LLM
from m27quant.runtime.generation import Prescription
from m27quant.runtime.host_memory import give_back_freed
from m27quant.serve import openapi
from m27quant.serve.answer import Answer, most_live, refuse_overload
from m27quant.serve.chat import ChatForm, prompt_of
from m27quant.serve.completion import CompletionForm, prompts_of
from m27quant.serve.errors import (
    ApiError,
    draining,
    from_fault,
    invalid,
    not_found,
    server_fault,
)
from m27quant.serve.forms import Form
from m27quant.serve.gate import Gate, error_response
from m27quant.serve.limits import ServerOptions, read_body
from m27quant.serve.protocol import ChatRequest, CompletionRequest, Settings, parse
from m27quant.serve.tools import prescription
from m27quant.serve.worker import Mailbox, Ticket, Worker

log = logging.getLogger("m27quant.serve")
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
LARGE_BODY = 2**16
"""Bytes of a request above which it is worked on beside the event loop."""


class Service:
    """What the paths share."""

    def __init__(self, llm: LLM, worker: Worker, options: ServerOptions, model: str) -> None:
        self.llm, self.worker, self.options, self.model = llm, worker, options, model
        self.started = int(time.time())
        self.is_draining = False
        self.num_requests = 0
        """HTTP requests that are being answered."""

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        asked, raw = await _beside(len(body), parse, ChatRequest, body)
        self._check(asked)
        prompt = await _beside(len(body), prompt_of, self.llm, asked, raw)
        form = ChatForm(self.llm, asked, raw, prompt, self.model)
        assert self.llm.tokenizer is not None
        prescribed = prescription(asked, self.llm.tokenizer, thinking=prompt.thinking)
        return self._answer(form, [prompt.token_ids], asked, prescribed)

    async def completion(self, request: Request) -> Response:
        body = await self._body(request)
        asked, _ = await _beside(len(body), parse, CompletionRequest, body)
        self._check(asked)
        prompts = await _beside(len(body), prompts_of, self.llm, asked)
        form = CompletionForm(self.llm, asked, prompts, self.model)
        return self._answer(form, prompts, asked)

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    def one_model(self, name: str) -> dict[str, Any]:
        self._check_name(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": self.started,
            "owned_by": "m27quant",
            "max_model_len": self.llm.max_model_len,
        }

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise not_found(
                f"there is no model '{escape(name)}' here, only '{escape(self.model)}'",
                code="model_not_found", param="model",
            )  # fmt: skip

    async def _body(self, request: Request) -> bytes:
        return await read_body(request.receive, dict(request.scope["headers"]), self.options)

    def _check(self, asked: Settings) -> None:
        """What the models of requests cannot say of themselves."""
        self._check_name(asked.model)
        if asked.stream_options is not None and not asked.stream:
            raise invalid("stream_options are for a stream: pass stream", param="stream_options")
        if isinstance(asked, ChatRequest) and asked.top_logprobs and not asked.logprobs:
            raise invalid(
                "top_logprobs are reported with logprobs alone: pass logprobs", param="top_logprobs"
            )
        most = self.options.max_tokens
        if most is not None and (asked.wanted_tokens or 0) > most:
            raise invalid(f"an answer has at most {most} tokens on this server", param="max_tokens")

    def _answer(
        self, form: Form, prompts: list[list[int]], asked: Settings, prescribed: Prescription | None = None
    ) -> Response:
        n = asked.n or 1
        if form.num_choices > self.options.max_choices:
            raise invalid(
                f"a request has at most {self.options.max_choices} answers on this server", param="n"
            )
        if form.num_choices > most_live(self.worker, self.options):
            raise invalid(
                f"{form.num_choices} answers never fit at once: {most_live(self.worker, self.options)} run or wait",
                param="n",
            )
        for prompt in prompts:
            self._check_length(prompt)
        mailbox = Mailbox()
        stream = bool(asked.stream)
        tickets = []
        for index in range(form.num_choices):
            params = replace(asked.sampling(index % n, self.options.max_tokens), prescribed=prescribed)
            tickets.append(Ticket(index, prompts[index // n], params, mailbox, stream))
        try:
            self.llm.generation.complete(tickets[0].params, self.llm.model.config.vocab_size)
        except UsageError as fault:
            raise from_fault(fault, param=fault.message.split()[0]) from None
        refuse_overload(self.worker, self.options, len(tickets))
        return Answer(self.worker, self.options, form, tickets, mailbox)

    def _check_length(self, prompt: list[int]) -> None:
        most = self.llm.max_model_len
        if not prompt:
            raise invalid("the prompt is empty", param="prompt")
        if len(prompt) >= most:
            raise invalid(
                f"the prompt has {len(prompt)} tokens; with an answer at most {most} fit",
                code="context_length_exceeded",
            )


async def _beside(size: int, function: Any, *arguments: Any) -> Any:
    """What is long is read, and made tokens of, in a thread: the streams of others go on."""
    if size < LARGE_BODY:
        return function(*arguments)
    return await asyncio.to_thread(_and_tidy, function, *arguments)


def _and_tidy(function: Any, *arguments: Any) -> Any:
    """Tokens and their places take a hundred times the text's bytes, which the C library would keep."""
    try:
        return function(*arguments)
    finally:
        give_back_freed()


def make_app(service: Service) -> ASGIApp:
    """The application, gate and all."""
    app = FastAPI(
        title="m27quant",
        version=m27quant.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    _add_paths(app, service)
    _add_faults(app)
    openapi.describe(app)
    if service.options.chat_page:
        from m27quant.serve.page_files import add_page

        add_page(app)
    gated: ASGIApp = Gate(app, service)
    if service.options.cors_origins:
        gated = CORSMiddleware(
            gated, allow_origins=service.options.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return gated


def _add_paths(app: FastAPI, service: Service) -> None:
    @app.get("/health", **openapi.HEALTH)
    async def health() -> Response:
        if service.is_draining:
            return error_response(draining())
        if not service.worker.is_healthy:
            return error_response(server_fault("the engine's last step failed"))
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", **openapi.METRICS)
    async def metrics() -> Response:
        return PlainTextResponse(
            service.worker.metrics.text(service.llm, service.model), media_type=PROMETHEUS
        )

    @app.get("/v1/models", **openapi.MODELS)
    async def models() -> Response:
        return JSONResponse(service.models())

    @app.get("/v1/models/{name:path}", **openapi.MODEL)
    async def model(name: str) -> Response:
        return JSONResponse(service.one_model(name))

    @app.post("/v1/chat/completions", **openapi.CHAT)
    async def chat(request: Request) -> Response:
        return await service.chat(request)

    @app.post("/v1/completions", **openapi.COMPLETION)
    async def completion(request: Request) -> Response:
        return await service.completion(request)


def _add_faults(app: FastAPI) -> None:
    """Whatever goes wrong is an error object."""

    @app.exception_handler(ApiError)
    async def apierror_response(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, ApiError)
        return error_response(fault)

    @app.exception_handler(HTTPException)
    async def httperror_response(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, HTTPException)
        where = f"{request.method} {escape(request.url.path)}"
        code = {404: "unknown_path", 405: "method_not_allowed"}.get(fault.status_code)
        message = f"there is no {where}" if code else str(fault.detail)
        return error_response(ApiError(fault.status_code, message, code=code, headers=fault.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def bad_request(request: Request, fault: Exception) -> Response:
        return error_response(invalid("the request's path or query cannot be"))

    @app.exception_handler(Exception)
    async def bug(request: Request, fault: Exception) -> Response:
        return error_response(server_fault())
