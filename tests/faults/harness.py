"""Running the program as a process that may be killed, and comparing what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Setup = Sequence[Any]
"""Name of a function of `tests.faults.warm` and its arguments."""
INDEX = "model.safetensors.index.json"
LOG = ".m27quant/run.log"
KILLED = 137
"""What a process that a fault point kills exits with."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended; a negative code is the signal that killed it."""

    code: int
    out: str
    err: str


class Process:
    """A run that may still be going on."""

    def __init__(self, program: Program, pid: int, folder: Path) -> None:
        self._program, self.pid, self._folder = program, pid, folder

    def send(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> Finished:
        self.send(signal.SIGKILL)
        return self.wait()

    def wait(self) -> Finished:
        code = self._program.ask({"wait": self.pid})["code"]
        said = [
            p.read_text() if p.exists() else "" for p in (self._folder / "stdout", self._folder / "stderr")
        ]
        return Finished(code, *said)


class Program:
    """The warm program of `tests.faults.warm`."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm"],
            cwd=repository,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_CURRENT_TEST": "faults"},
            start_new_session=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def start(
        self,
        *argv: Path | str,
        env: dict[str, str | None] | None = None,
        setup: Sequence[Setup] = (),
        umask: int = 0o022,
        cwd: Path | None = None,
    ) -> Process:
        """Begin a run; its environment is the test session's, changed by `env`."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir(mode=0o777)
        folder.chmod(0o777)  # another user may run there
        answer = self.ask(
            {
                "argv": [str(a) for a in argv],
                "env": env or {},
                "setup": list(setup),
                "umask": umask,
                "cwd": str(cwd or folder),
                "stdout": str(folder / "stdout"),
                "stderr": str(folder / "stderr"),
            }
        )
        return Process(self, answer["pid"], folder)

    def run(self, *argv: Path | str, **options: Any) -> Finished:
        return self.start(*argv, **options).wait()

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()


# -- several ranks ---------------------------------------------------------------------------------

SMALL_CHUNKS = ("set_attribute", "m27quant.calib.memory.CHUNK_TOKENS", {"cpu": 40})
"""One row of the case to a chunk: six to deal out."""
PATIENCE = ("set_attribute", "m27quant.distributed.join.JOIN_S", 10)
"""Seconds to wait for ranks that were killed before they came: nobody launched these who would tell."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def launch(
    program: Program,
    argv: tuple[str, ...],
    size: int,
    *,
    setup: list[Setup] | None = None,
    only: dict[int, dict[str, Any]] | None = None,
) -> list[Process]:
    """Begin `size` ranks as a launcher does; `only` has further arguments of `start` for some ranks."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    processes = []
    for rank in range(size):
        extra = dict((only or {}).get(rank, {}))
        env: dict[str, str | None] = {
            **common,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
        }
        env |= extra.pop("env", {})
        more = [SMALL_CHUNKS, PATIENCE, *(setup or []), *extra.pop("setup", [])]
        processes.append(program.start(*argv, *extra.pop("argv", ()), env=env, setup=more))
    return processes


def together(program: Program, argv: tuple[str, ...], size: int, **options: Any) -> list[Finished]:
    return [process.wait() for process in launch(program, argv, size, **options)]


# -- what is left ----------------------------------------------------------------------------------

Tree = dict[str, str]
"""Relative path of every file -> SHA-256 of its content."""


def tree(folder: Path) -> Tree:
    """Everything below `folder` but the run's log."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if (name := str(p.relative_to(folder))) != LOG
    }


def visible(folder: Path) -> Tree:
    """`tree` without the private folder: what other programs see."""
    return {name: digest for name, digest in tree(folder).items() if not name.startswith(".m27quant/")}


def passes_for_a_checkpoint(out: Path) -> bool:
    """What loaders look for: an index, or weights in one file."""
    return (out / INDEX).exists() or (out / "model.safetensors").exists()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def units_done(out: Path) -> int:
    """Units that the journal of an unfinished run tells of."""
    try:
        return (out / ".m27quant" / "journal.jsonl").read_bytes().count(b'"step": "unit"')
    except FileNotFoundError:
        return 0
