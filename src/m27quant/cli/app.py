"""The program: its commands, and the one place where an exception becomes an exit code."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise
from types import FrameType
from typing import Annotated

import typer

import m27quant
from m27quant.cli import (
    assemble,
    bench,
    env,
    eval,
    explain,
    inspect,
    pull,
    push,
    quantize,
    report,
    run,
    serve,
    verify,
)
from m27quant.cli.drafter import drafter_app
from m27quant.cli.output import Mode, Output
from m27quant.cli.recipe import recipe_app
from m27quant.errors import EnvironmentFault, Interrupted, M27Error, UsageError

BROKEN_PIPE = 128 + signal.SIGPIPE
"""What the shell reports of any program whose reader went away."""

INTERRUPTED = 128 + signal.SIGINT

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO}
"""System errors that say something about the machine and nothing about our code."""

app = typer.Typer(
    name="m27quant",
    help="Quantize MiniMax-M2.x to NVFP4, prove the result, and run it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"m27quant {m27quant.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Quantize MiniMax-M2.x to NVFP4, prove the result, and run it."""


app.add_typer(recipe_app, name="recipe")
app.add_typer(drafter_app, name="drafter")
app.command("env")(env.env)
app.command("quantize")(quantize.quantize)
app.command("assemble")(assemble.assemble)
app.command("verify")(verify.verify)
app.command("eval")(eval.eval_)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("push")(push.push)
app.command("pull")(pull.pull)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.command("inspect")(inspect.inspect)
app.command("explain")(explain.explain)


class _Stop:
    """Sends SIGTERM down the way of Ctrl-C, and remembers which of the two it was."""

    signum = signal.SIGINT

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signal.Signals(signum)
        raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on `argv` (default: the process's arguments) and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    stop = _Stop()
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        code = _run(args, stop)
        sys.stdout.flush()
    except OSError as error:
        _abandon_stdout()
        code = BROKEN_PIPE if isinstance(error, BrokenPipeError) else EnvironmentFault.exit_code
    finally:
        signal.signal(signal.SIGTERM, previous)
    return code


def _run(args: list[str], stop: _Stop) -> int:
    """The program without its process: any exception but a reader's leaving becomes an exit code."""
    try:
        result = app(args=args, prog_name="m27quant", standalone_mode=False)
    except M27Error as error:
        return _report(args, error, error)
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.message, err=True)
            return UsageError.exit_code
        return _report(args, _usage_error(error), error)
    except typer.Abort:
        result = INTERRUPTED
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # Typer's own answer to it is exit code 1.
            raise error.__context__ from None
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - the last net: whatever falls here is the machine or a bug
        return _report(args, _surroundings(error) or _bug(error), error)
    if result == INTERRUPTED:  # Typer's answer to KeyboardInterrupt.
        return _report(args, Interrupted(f"stopped by {stop.signum.name}", signum=stop.signum))
    return result if isinstance(result, int) else 0


def _report(args: list[str], fault: M27Error, cause: Exception | None = None) -> int:
    output = Output(Mode.JSON if _asks_for_json(args) else Mode.HUMAN)
    debug = cause is not None and os.environ.get("M27QUANT_DEBUG", "") not in ("", "0")
    output.error(fault, traceback="".join(traceback.format_exception(cause)) if debug else None)
    return fault.exit_code


def _asks_for_json(args: list[str]) -> bool:
    """`--json`, or an output format of that name, before a `--`; also where the arguments cannot be parsed."""
    before_dashes = args[: args.index("--")] if "--" in args else args
    spelled = ("--output-format", "--format")
    named = any((name, "json") in pairwise(before_dashes) for name in spelled)
    return named or "--json" in before_dashes or any(f"{name}=json" in before_dashes for name in spelled)


def _usage_error(error: typer.TyperException) -> M27Error:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "m27quant"
    return UsageError(error.format_message(), hint=f"see `{command} --help`")


def _surroundings(error: Exception) -> M27Error | None:
    """The fault of disk, memory or device behind an exception that no room has named better."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f": {error.filename}" if error.filename else ""
        return EnvironmentFault(
            f"{error.strerror}{where}", hint="see `m27quant env` for this machine's limits"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return EnvironmentFault(
            f"out of memory: {error}" if str(error) else "out of memory",
            hint="lower --max-memory, or see `m27quant env` for this machine's limits",
        )
    return None


def _bug(error: Exception) -> M27Error:
    return M27Error(
        f"internal error, a bug in m27quant: {type(error).__name__}: {error}",
        hint="set M27QUANT_DEBUG=1 for the traceback and report it with the output of `m27quant env`",
    )


def _prepare_streams() -> None:
    """Show what a terminal cannot encode as escapes, and lose nothing of what a pipe takes in parts."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    raw = getattr(sys.stdout, "buffer", None)
    if isinstance(raw, io.RawIOBase):  # PYTHONUNBUFFERED: Python would drop the rest of a partial write.
        buffer = io.BufferedWriter(io.FileIO(raw.fileno(), "wb", closefd=False))  # who has it keeps it
        sys.stdout = io.TextIOWrapper(buffer, sys.stdout.encoding, sys.stdout.errors, line_buffering=True)


def _abandon_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush stays silent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
