"""`m27quant pull`: one commit of a repository on the Hub, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m27quant.cli import options as shared
from m27quant.cli.output import Output, pairs
from m27quant.cli.progress import show
from m27quant.cli.push import silence_hub
from m27quant.cli.units import format_size
from m27quant.errors import UsageError

Repository = Annotated[
    str,
    typer.Argument(
        metavar="ORG/NAME[@REVISION]", help="Repository on the Hub, and which revision.", show_default=False
    ),
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="New folder for the checkpoint.", show_default=False)
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Take it without verify's checks.")]
Full = Annotated[
    bool,
    typer.Option("--full", help="Verify all weights and the Hub's SHA-256, not headers and configs only."),
]


def pull(
    repository: Repository,
    out: Out,
    full: Full = False,
    no_verify: NoVerify = False,
    revision: shared.Revision = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    no_progress: shared.NoProgress = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
) -> None:
    """Download a checkpoint from the Hub to a new folder and verify it there.

    The revision is resolved to a commit, which OUT/.m27quant/pull.json records.  Until everything is there and
    verified, OUT holds no config.json and no index; the same command goes on with an unfinished download.

    Examples:
      m27quant pull my-org/MiniMax-M2.7-NVFP4 ./m27-nvfp4

      m27quant pull my-org/MiniMax-M2.7-NVFP4@v1 ./m27-nvfp4 --full
    """
    if full and no_verify:
        raise UsageError("--full and --no-verify exclude each other")
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    if no_verify:
        output.warning("--no-verify: nobody has checked that this checkpoint is right")
    from m27quant.pull import PullOptions, pull_checkpoint

    silence_hub(output, no_progress)
    options = PullOptions(
        revision=revision, verify=not no_verify, level="full" if full else "quick", offline=offline,
        token=token.reveal() if token else None,
    )  # fmt: skip
    with show(output, enabled=full and not no_progress) as progress:
        pulled = pull_checkpoint(repository, out, options, say=output.status, progress=progress)
    facts = {
        "repository": pulled.repo_id,
        "commit": pulled.commit,
        "folder": pulled.folder,
        "size": f"{format_size(pulled.total_bytes)} in {pulled.files} files",
        "verified": pulled.verified or "no",
    }
    output.result(pulled.document(), human=pairs(facts), quiet=pulled.commit)
