"""Writes what docs/ has of the program itself: `python -m m27quant.cli.docs cli > docs/cli.md`, `checks`, `serving`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import typer
import typer.main

from m27quant.cli.app import app
from m27quant.report.checks import book
from m27quant.serve.book import serving
from m27quant.verify.checks import CHECKS

HEADER = """\
# Command line

Written by `make docs` from the program itself; a test compares the two.

Data goes to stdout, all else to stderr. With `--json` stdout holds one document with `schema_version`, and
every line of stderr is a JSON object with one of the keys `warning`, `hint`, `progress`, `error`. An error
is `{"schema_version": 1, "error": {"message", "hint", "exit_code", "kind"}}`, the last line of stderr; stdout
is empty then, unless the command had printed its result before it failed.

| exit code | meaning |
|---|---|
| 0 | done, nothing to report |
| 1 | the command worked and found problems |
| 2 | wrong usage, or a recipe that cannot be followed |
| 3 | input that is unreadable, corrupt or not supported |
| 4 | the machine: disk, memory, device, permission, network |
| 5 | the output folder is locked by another run or holds somebody else's files |
| 70 | a bug in m27quant |
| 129, 130, 143 | stopped by SIGHUP, SIGINT or SIGTERM; a long run can be resumed |
| 141 | whoever read stdout went away |

`M27QUANT_DEBUG=1` adds the traceback to an error, `NO_COLOR=1` removes colour, `M27QUANT_KERNELS=reference`
forces the kernels written in plain torch.
"""


def contexts() -> Iterator[typer.Context]:
    """Every command in the order of `--help`, as the context that knows its full name, usage and options."""
    command = typer.main.get_command(app)
    yield from _walk(
        typer.Context(command, info_name="m27quant", terminal_width=1000, max_content_width=1000)
    )


def reference() -> str:
    """The whole of docs/cli.md."""
    return HEADER + "".join(_section(context) for context in contexts())


def _walk(context: typer.Context) -> Iterator[typer.Context]:
    yield context
    for name, command in getattr(context.command, "commands", {}).items():
        if not command.hidden:
            yield from _walk(typer.Context(command, parent=context, info_name=name))


def _section(context: typer.Context) -> str:
    command = context.command
    usage = context.get_usage().removeprefix("Usage: ")
    text, _, examples = inspect.cleandoc(command.help or "").partition("\nExamples:\n")
    records = [record for p in command.params if (record := p.get_help_record(context))]
    lines = [f"\n## {context.command_path}\n\n```\n{usage}\n```\n\n{text.rstrip()}\n"]
    if examples:
        lines.append(f"\n```\n{inspect.cleandoc(examples)}\n```\n")
    if records:
        lines.append("\n| | |\n|---|---|\n")
        lines += [f"| `{_escape(names)}` | {_escape(words)} |\n" for names, words in records]
    if command.epilog:
        lines.append(f"\n{inspect.cleandoc(command.epilog)}\n")
    return "".join(lines)


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    pages = {"cli": reference, "checks": lambda: book(CHECKS.values()), "serving": serving}
    sys.stdout.write(pages[sys.argv[1]]())
