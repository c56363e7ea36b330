"""The program with one more command, which fails as it is told: `python -m tests.cli.raising fail NAME`."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time

import typer

from m27quant import errors
from m27quant.cli import options
from m27quant.cli.app import app, main
from m27quant.cli.output import Output
from m27quant.cli.stopping import graceful

FAULTS: dict[str, BaseException] = {
    "findings": errors.FindingsError("3 findings"),
    "calibration": errors.CalibrationError("too many bad rows"),
    "usage": errors.UsageError("--a and --b exclude each other", hint="drop one"),
    "recipe": errors.RecipeError("r.yaml:3: unknown key"),
    "checkpoint": errors.CheckpointError("[/red]\x1b[2J.safetensors: truncated", hint="download it again"),
    "environment": errors.EnvironmentFault("no disk"),
    "output": errors.OutputError("locked"),
    "interrupted": errors.Interrupted("stopped in layer 3", hint="m27quant quantize ... --resume"),
    "terminated": errors.Interrupted("stopped", signum=signal.SIGTERM),
    "bug": ZeroDivisionError("division by zero"),
    "base": errors.M27Error("unnamed"),
    "disk full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard-1"),
    "memory": MemoryError(),
    "other system error": FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "x"),
    "abort": typer.Abort(),
    "keyboard": KeyboardInterrupt(),
}


def fail(name: str, json: options.Json = False) -> None:
    """Raise the fault of that name."""
    raise FAULTS[name]


def wait(json: options.Json = False, resumable: bool = False) -> None:
    """Wait to be stopped by a signal."""
    output = Output.open(json=json)
    sys.stderr.write("ready\n")
    sys.stderr.flush()
    if not resumable:
        time.sleep(60)
    with graceful(output, "m27quant ... --resume") as stop:
        sys.stderr.write("steady\n")
        sys.stderr.flush()
        for _ in range(600):
            time.sleep(0.1)
            stop()


def flood(json: options.Json = False) -> None:
    """Print more than a pipe holds."""
    Output.open(json=json).table([{"n": n} for n in range(20_000)], columns={"n": "n"})


if __name__ == "__main__":
    for command in (fail, wait, flood):
        app.command()(command)
    sys.exit(main())
