"""`m27quant assemble`: the parts of many jobs into one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m27quant.cli import options as shared
from m27quant.cli.output import Output
from m27quant.cli.progress import show
from m27quant.cli.quantize import document, summary
from m27quant.cli.stopping import graceful

Folders = Annotated[
    list[Path],
    typer.Argument(
        metavar="PART... OUT",
        help="Folders that `quantize --layers` has made, and last the folder to create.",
        show_default=False,
    ),
]
SourceOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="The source, where the parts' own is elsewhere now.",
        show_default=False,
    ),
]
RangesOption = Annotated[
    Path | None,
    typer.Option(
        "--ranges",
        metavar="FILE",
        help="The calibration.json, where the parts' own is elsewhere now.",
        show_default=False,
    ),
]

NoVerify = Annotated[bool, typer.Option("--no-verify", help="Commit without verify's checks of the whole.")]


def assemble(
    folders: Folders,
    model: SourceOption = None,
    ranges: RangesOption = None,
    no_verify: NoVerify = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
    no_progress: shared.NoProgress = False,
) -> None:
    """Join the parts of `m27quant quantize --layers` into the checkpoint that one run would have made.

    Every part is checked first: finished, of the same run, no layer missing or double, no file damaged; then the
    whole is verified.  Anything wrong is named and nothing is committed, with exit code 1.  The parts stay; on one
    file system the shards are links to theirs.  Cut short, the same command goes on.

    Examples:
      m27quant assemble parts/* ./m27-nvfp4
    """
    if len(folders) < 2:
        raise typer.BadParameter(
            "name at least one part, and last the folder to create", param_hint="PART... OUT"
        )
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    from m27quant.assemble import assemble_checkpoint

    def say(message: str) -> None:
        kind, _, text = message.partition(": ")
        output.warning(text) if kind == "notice" else output.status(message)

    with graceful(output, "the same command") as stop, show(output, enabled=not no_progress) as progress:
        result = assemble_checkpoint(
            folders[:-1],
            folders[-1],
            model=model,
            ranges=None if ranges is None else str(ranges),
            verify=not no_verify,
            progress=progress,
            stop=stop,
            say=say,
        )
    output.result(document(result), human=summary(result), quiet=result.out)
