"""Ctrl-C on long work: the first one ends it where it can be resumed, the second one at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

from m27quant.cli.output import Output
from m27quant.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def graceful(output: Output, resume_command: str) -> Iterator[Callable[[], None]]:
    """Yield a function that raises `Interrupted` once a signal has come; handlers are put back at the end.

    `resume_command` is empty where nothing can be resumed.
    """
    came: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if came:
            os._exit(128 + signum)
        came.append(signum)
        with suppress(RuntimeError):  # the stream is in the middle of a write
            output.status("stopping; once more to stop at once")

    def stop() -> None:
        if came:
            kept = "; what was finished is kept" if resume_command else ""
            raise Interrupted(
                f"stopped by {signal.Signals(came[0]).name}{kept}",
                signum=came[0],
                hint=f"continue with: {resume_command}" if resume_command else None,
            )

    before = {s: signal.signal(s, handle) for s in SIGNALS}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def resume_command() -> str:
    """This process's own command line with `--resume`, without secrets and without `--overwrite`."""
    kept, positional = _arguments()
    return shlex.join([*_program(), *kept, "--resume", *positional])


def _program() -> list[str]:
    """How this process was started: by itself, or by torchrun with others."""
    size, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not (size.isdecimal() and here.isdecimal()) or int(size) <= 1:
        return ["m27quant"]
    nodes = [] if size == here else ["--nnodes", str(int(size) // max(1, int(here)))]
    return ["torchrun", *nodes, "--nproc-per-node", here, "-m", "m27quant"]


def command_line(renamed: Mapping[str, str]) -> str:
    """This process's own command line for others to repeat: no secrets, no `--resume` or `--overwrite`.

    Arguments that are keys of `renamed` are shown under other names.
    """
    kept, positional = _arguments()
    return shlex.join([*_program(), *(renamed.get(argument, argument) for argument in [*kept, *positional])])


def _arguments() -> tuple[list[str], list[str]]:
    """What stands before `--`, cleaned, and the rest with it."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept: list[str] = []
    skip = False
    for argument in arguments[:end]:
        if skip or argument in ("--overwrite", "--resume", "--token") or argument.startswith("--token="):
            skip = argument == "--token"
            continue
        kept.append(argument)
    return kept, arguments[end:]
