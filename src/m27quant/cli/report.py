"""`m27quant report`: one page about a checkpoint, for people to look at and to pass on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m27quant.cli import options as shared
from m27quant.cli.output import Output
from m27quant.cli.verify import Checkpoint
from m27quant.errors import OutputError, UsageError, escape

if TYPE_CHECKING:
    from m27quant.verify.findings import VerifyResult

STDOUT = Path("-")
HEAD_BYTES = 1024

OutputFile = Annotated[
    Path,
    typer.Option(
        "--output-file",
        "-o",
        metavar="FILE",
        help="Where the page goes; - is stdout.",
        rich_help_panel=shared.OUTPUT_PANEL,
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace FILE whatever it is; without it only a page of m27quant's.",
        rich_help_panel=shared.OUTPUT_PANEL,
    ),
]


def report(
    checkpoint: Checkpoint,
    output_file: OutputFile,
    overwrite: Overwrite = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
) -> None:
    """Write one self-contained HTML page: verdict, sizes, SQNR and scales by layer and expert, findings.

    Whatever was found, exit code 0 means that the page was written: `m27quant verify` is what a script asks.

    Examples:
      m27quant report ./m27-nvfp4 -o report.html

      m27quant report ./m27-nvfp4 -o - > report.html
    """
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    if output_file == STDOUT and json:
        raise UsageError("--json and --output-file - both want stdout", hint="give a file's name")
    if output_file != STDOUT and not overwrite:
        _refuse_foreign(output_file)
    page, result = _page(Path(checkpoint))
    if output_file == STDOUT:
        output.stdout.write(page)
        return
    from m27quant.report.text import summary

    _write(output_file, page.encode("ascii"))
    counts = {s: sum(f.severity == s for f in result.findings) for s in ("error", "warning", "note")}
    document = {"output_file": str(output_file), "bytes": len(page), "ok": result.ok, "summary": counts}
    word = "passed" if result.ok else "failed"
    output.result(document, human=f"{word}: {summary(result)}; written to {output_file}", quiet=output_file)


def _page(checkpoint: Path) -> tuple[str, VerifyResult]:
    from m27quant.checkpoint.card import licence_of
    from m27quant.report.html import Page, render
    from m27quant.report.measured import measure
    from m27quant.report.recorded import read_recorded
    from m27quant.verify.run import verify_checkpoint

    result = verify_checkpoint(checkpoint)
    recorded, unrecorded = read_recorded(checkpoint)
    page = Page(
        result=result,
        measured=measure(checkpoint),
        recorded=recorded,
        unrecorded=unrecorded,
        licence=licence_of(checkpoint),
    )
    return render(page), result


def _refuse_foreign(path: Path) -> None:
    """A regular file is replaced only where its head names us."""
    from m27quant.checkpoint.durable import raise_for_os_error

    try:
        if path.is_dir():
            raise OutputError(f"{escape(path)}: a folder", hint="name a file, as in `-o report.html`")
        if not path.is_file():
            return
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except (OSError, ValueError) as fault:
        if isinstance(fault, OSError):
            raise_for_os_error(fault, path)
        raise UsageError(f"{escape(path)}: not a path", hint="name a file") from None
    if b'<meta name="generator" content="m27quant report ' not in head:
        raise OutputError(
            f"{escape(path)}: exists and is no page of m27quant's",
            hint="name another file, or add --overwrite",
        )


def _write(path: Path, data: bytes) -> None:
    from m27quant.checkpoint.durable import raise_for_os_error, write_durably

    if path.exists() and not path.is_file():  # a pipe, a device: nothing to replace
        try:
            path.write_bytes(data)
        except OSError as fault:
            raise_for_os_error(fault, path)
    else:
        write_durably(path, data)
