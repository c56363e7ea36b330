"""The builtin server: a socket, a loaded model, uvicorn, and an end that finishes what was begun."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from m27quant.errors import EnvironmentFault, escape
from m27quant.runtime.options import RunOptions
from m27quant.serve.limits import ServerOptions as ServerOptions

if TYPE_CHECKING:
    import uvicorn

    from m27quant.runtime.api import LLM

log = logging.getLogger("m27quant.serve")
SWITCH_S = 0.0005
"""How long a thread may keep Python's lock from the engine's."""


def serve(
    source: str | Path | Callable[[], LLM],
    options: RunOptions | None = None,
    drafter: Any = None,
    server: ServerOptions | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    **load_arguments: Any,
) -> int:
    """Serve a model until a signal ends it; returns the exit code.

    The first SIGTERM or SIGINT lets answers that were begun finish and refuses new ones; the second ends at once.

    Args:
        source: a checkpoint as `m27quant.load` takes it, or a function that gives a loaded model.
        options: how to run the model.
        drafter: as `m27quant.load` takes it.
        server: how to serve it.
        say: takes one line about each thing that was decided, and the address.
        load_arguments: further arguments of `m27quant.load`.

    Raises:
        EnvironmentFault: the extra `serve` is not installed, or the address cannot be bound.
        M27Error: as `m27quant.load`.
    """
    server = server or ServerOptions()
    require_extra()
    with contextlib.closing(_bind(server)) as listener:
        if not server.is_loopback and server.api_key is None:
            say(f"anybody who reaches {escape(server.host)} can use this server: set an API key")
        if callable(source):
            llm = source()
        else:
            from m27quant.llm import load

            llm = load(source, options, drafter=drafter, say=say, **load_arguments)
        _warm(llm)
        model = server.served_model_name or _name(source)
        Server(llm, server, model, listener=listener, say=say).run()
    return 0


def require_extra() -> None:
    """Raise `EnvironmentFault` where the extra `serve` is not installed."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise EnvironmentFault(
            f"the builtin server needs {' and '.join(missing)}", hint="pip install 'm27quant[serve]'"
        )


def _bind(options: ServerOptions) -> socket.socket:
    """Before the model is loaded: a port that is taken is known at once.  It refuses connections until then."""
    listener = None
    try:
        found = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as fault:
        if listener is not None:
            listener.close()
        why = fault.strerror if isinstance(fault, OSError) else "not a host name"
        raise EnvironmentFault(
            f"{escape(options.host)}:{options.port} cannot be bound ({why})",
            hint="choose another --host or --port",
        ) from None
    return listener


def _name(source: object) -> str:
    """A folder's name, a Hub id as it is."""
    if not isinstance(source, str | Path):
        return "m27quant"
    return Path(source).resolve().name if Path(source).is_dir() else str(source)


def _warm(llm: LLM) -> None:
    """What is imported or built with the first prompt must not hold up the first client."""
    if llm.tokenizer is None:
        return
    llm.tokenizer.token_bytes(0)
    if llm.tokenizer.has_chat_template:
        from m27quant.errors import M27Error
        from m27quant.runtime.chat import chat_prompt

        with contextlib.suppress(M27Error):
            chat_prompt(llm.tokenizer, [{"role": "user", "content": "Hello"}])


class Server:
    """A loaded model at an address, from its first request to its last."""

    def __init__(
        self,
        llm: LLM,
        options: ServerOptions,
        model: str,
        *,
        listener: socket.socket | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Put the parts together; `run` begins.

        Args:
            llm: used by the server's engine thread alone from then on.
            options: how to serve it.
            model: its name in requests.
            listener: a bound socket; None: as the options say.
            say: as in `serve`.

        Raises:
            EnvironmentFault: the address cannot be bound.
        """
        from m27quant.serve.app import Service, make_app
        from m27quant.serve.metrics import Metrics
        from m27quant.serve.worker import Worker

        self.service = Service(llm, Worker(llm, Metrics()), options, model)
        self._listener, self._say = listener or _bind(options), say
        self._uvicorn = _uvicorn(make_app(self.service), options.body_timeout_s)
        self._num_signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """The URL to begin paths with; its port is known before `run`."""
        host, port = self._listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Serve until `stop` or a signal; signals come to the main thread only."""
        before, switch = {}, sys.getswitchinterval()
        if threading.current_thread() is threading.main_thread():
            before = {s: signal.signal(s, self._signalled) for s in (signal.SIGINT, signal.SIGTERM)}
        sys.setswitchinterval(SWITCH_S)
        try:
            with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
                runner.run(self._main())
        finally:
            sys.setswitchinterval(switch)
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def stop(self) -> None:
        """From any thread: refuse what is new, finish what was begun, then end."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_draining)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        worker = self.service.worker
        worker.start(self._loop)
        announcing = asyncio.create_task(self._announce())
        try:
            await self._uvicorn.serve([self._listener])
        finally:
            announcing.cancel()
            worker.stop()

    async def _announce(self) -> None:
        while not self._uvicorn.started:
            await asyncio.sleep(0.01)
        self._say(f"listening on {self.address}")

    def _signalled(self, signum: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            os._exit(128 + signum)
        self.stop()

    def _begin_draining(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Refuse what is new, wait for what runs, then let uvicorn end."""
        service = self.service
        service.is_draining = True
        with contextlib.suppress(OSError):  # whoever read what is said may be gone
            self._say(f"finishing {service.worker.num_live} answers; once more to stop at once")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(service.options.drain_timeout_s):
                while service.worker.num_live or service.num_requests:
                    await asyncio.sleep(0.05)
        self._uvicorn.should_exit = True


def _uvicorn(app: Any, silence_s: float) -> uvicorn.Server:
    import uvicorn

    config = uvicorn.Config(
        app, log_config=None, log_level="error", access_log=False, lifespan="off", ws="none", server_header=False,
        backlog=1024, timeout_keep_alive=30, timeout_graceful_shutdown=1, h11_max_incomplete_event_size=2**16,
    )  # fmt: skip
    config.load()
    config.http_protocol_class = _guarded(config.http_protocol_class, silence_s)

    class Quiet(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            yield  # signals are `Server`'s, which lets answers finish first

    return Quiet(config)


def _guarded(protocol: Any, silence_s: float) -> Any:
    """uvicorn's protocol, but what is no HTTP gets an error object, and who says nothing is hung up on."""
    from m27quant.serve.errors import invalid

    class Protocol(protocol):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.silence = self.loop.call_later(silence_s, self.hang_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self.silence.cancel()
            super().connection_lost(exc)

        def hang_up(self) -> None:
            if self.cycle is None:
                self.transport.close()

        def send_400_response(self, msg: str) -> None:
            body = invalid("not a valid HTTP request", code="invalid_http").body()
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
            self.transport.close()

    return Protocol
