"""The program, run many times without being started many times: imports once, forks for every run.

Run as `python -m tests.faults.warm`; reads one JSON request per line, answers one JSON line each:
{"warm": [...]} runs the program in this process, once;
{"argv": [...], ...} starts a run and answers {"pid": ...}; {"wait": PID} answers {"code": ...}.
One thread only, here and in the runs: a fork keeps no other.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet  # noqa: F401 - loaded late by the program, maybe from where only root may enter
import torch
import torch._dynamo  # loaded at the first optimizer's step

import m27quant.checkpoint.card
import m27quant.cli.app
import m27quant.job
import m27quant.layer_job
import m27quant.quantize
import m27quant.recipes.loader


def set_attribute(path: str, value: Any) -> None:
    """Set `package.module.name` to a value."""
    module, _, name = path.rpartition(".")
    setattr(importlib.import_module(module), name, value)


def without_disk_check() -> None:
    """Begin whatever the disk has."""
    set_attribute("m27quant.standing.check_disk", lambda out, needed: None)


def with_process_id(pid: int) -> None:
    """In a container every run has the same one."""
    set_attribute("os.getpid", lambda: pid)


def on_device_class(name: str) -> None:
    """The run's device claims to be another kind."""
    set_attribute("m27quant.prepare._device_class", lambda device: name)


def slowly(seconds: float) -> None:
    """Sleep at every step of progress."""
    send = m27quant.layer_job._Reporter._send

    def slow(self: Any, *args: Any, **kwargs: Any) -> None:
        time.sleep(seconds)
        send(self, *args, **kwargs)

    m27quant.layer_job._Reporter._send = slow  # type: ignore[method-assign]


def deaf() -> None:
    """Never notice that a signal has come."""
    graceful = m27quant.cli.quantize.graceful

    def handlers_only(*args: Any) -> Any:
        context = graceful(*args)
        enter = context.__enter__
        context.__enter__ = lambda: enter() and None  # type: ignore[method-assign]
        return context

    set_attribute("m27quant.cli.quantize.graceful", handlers_only)
    set_attribute("m27quant.quantize.Job", lambda **fields: Job(**fields | {"stop": lambda: None}))


Job = m27quant.job.Job


def limit(name: str, value: int) -> None:
    """Set a resource limit of this process."""
    kind = getattr(resource, name)
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def nobody_reads(fd: int) -> None:
    """The reader of a stream went away before anything was written."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, fd)
    setattr(sys, {1: "stdout", 2: "stderr"}[fd], os.fdopen(fd, "w", closefd=False))


def as_user(uid: int) -> None:
    """Give up root."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


SETUPS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        as_user,
        deaf,
        limit,
        nobody_reads,
        on_device_class,
        set_attribute,
        slowly,
        with_process_id,
        without_disk_check,
    )
}


def child(request: dict[str, Any]) -> NoReturn:
    """Become one run of the program."""
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), fd)
        os.umask(request["umask"])
        for key, value in request["env"].items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
        for name, *arguments in request["setup"]:
            SETUPS[name](*arguments)
        os.chdir(request["cwd"])
        sys.argv = ["m27quant", *request["argv"]]
        code = m27quant.cli.app.main()
        sys.stdout.flush()
        with contextlib.suppress(OSError):  # as the interpreter does it when it ends
            sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - a fault of this harness; the run's own end in exit codes
        traceback.print_exc()
    finally:
        os._exit(code)


def open_to_all(folder: Path) -> None:
    """Let the program read its own data in `folder`: it may lie where only root may enter."""
    folder.chmod(0o755)
    for module, name in ((m27quant.recipes.loader, "_FOLDER"), (m27quant.checkpoint.card, "TEMPLATES")):
        copy = shutil.copytree(getattr(module, name), folder / name, ignore=shutil.ignore_patterns("*.py*"))
        setattr(module, name, Path(copy))


def serve() -> None:
    """Answer requests until nobody asks."""
    with tempfile.TemporaryDirectory() as folder:
        open_to_all(Path(folder))
        answer_requests()


def answer_requests() -> None:
    """One line in, one line out."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "warm" in request:  # what is loaded and compiled on first use need not be so in every child
            answer = {"code": m27quant.cli.app.main(request["warm"])}
        elif "wait" in request:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                child(request)
            answer = {"pid": pid}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
