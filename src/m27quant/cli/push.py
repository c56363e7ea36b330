"""`m27quant push`: a verified checkpoint to the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.text import Text

from m27quant.cli import options as shared
from m27quant.cli.output import Mode, Output, grid, pairs
from m27quant.cli.progress import show
from m27quant.cli.units import format_size
from m27quant.errors import UsageError

if TYPE_CHECKING:
    from m27quant.push import PushResult

Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Folder of the checkpoint.", show_default=False)
]
Repository = Annotated[
    str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hub.", show_default=False)
]
Private = Annotated[
    bool, typer.Option("--private", help="Make the repository private; refuse one that is public.")
]
Branch = Annotated[
    str,
    typer.Option(
        "--revision", "--branch", metavar="BRANCH", help="Branch to commit to; made if it is not there."
    ),
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")]
Message = Annotated[
    str | None, typer.Option("--message", "-m", help="Title of the commit.", show_default=False)
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check all, show what would be uploaded, and ask the Hub nothing."),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Push without verify's checks.")]
Full = Annotated[bool, typer.Option("--full", help="Verify all weights first, as verify --full does.")]


def push(
    checkpoint: Checkpoint,
    repository: Repository,
    private: Private = False,
    revision: Branch = "main",
    create_pr: CreatePr = False,
    message: Message = None,
    dry_run: DryRun = False,
    full: Full = False,
    no_verify: NoVerify = False,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    no_progress: shared.NoProgress = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
) -> None:
    """Upload a checkpoint to the Hub, once verify finds no error in it.

    Only its own files go: no secrets, nobody else's.  config.json and index go last; an upload that was cut short
    goes on when the same is called again.  Exit code 1: not fit to be pushed.

    Examples:
      m27quant push ./m27-nvfp4 my-org/MiniMax-M2.7-NVFP4 --private --dry-run

      m27quant push ./m27-nvfp4 my-org/MiniMax-M2.7-NVFP4 --create-pr
    """
    if full and no_verify:
        raise UsageError("--full and --no-verify exclude each other")
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    if no_verify:
        output.warning("--no-verify: nobody has checked that this checkpoint is right")
    from m27quant.push import DEFAULT_MESSAGE, PushOptions, push_checkpoint

    silence_hub(output, no_progress)
    options = PushOptions(
        private=private or None, revision=revision, create_pr=create_pr, message=message or DEFAULT_MESSAGE,
        verify=not no_verify, level="full" if full else "default", dry_run=dry_run, offline=offline,
        token=token.reveal() if token else None,
    )  # fmt: skip
    with show(output, enabled=not no_progress) as progress:
        pushed = push_checkpoint(checkpoint, repository, options, say=output.status, progress=progress)
    output.result(pushed.document(), human=_render(pushed), quiet=pushed.commit or pushed.total_bytes)


def silence_hub(output: Output, no_progress: bool) -> None:
    """The Hub's client draws bars of its own on stderr, where JSON and quiet modes want none."""
    if no_progress or output.mode is not Mode.HUMAN or not output.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


def _render(pushed: PushResult) -> Group:
    facts = {
        "repository": pushed.repo_id,
        "revision": pushed.revision,
        "visibility": "private" if pushed.private else "as it is, or the Hub's default",
        "verified": pushed.verified or "no",
        "size": f"{format_size(pushed.total_bytes)} in {len(pushed.files)} files",
        "left out": ", ".join(f"{name} ({why})" for name, why in pushed.left_out.items()) or "nothing",
    }
    if not pushed.dry_run:
        facts |= {"commit": pushed.commit or "", "url": pushed.url or ""}
        if pushed.pull_request:
            facts["pull request"] = pushed.pull_request
        return Group(pairs(facts))
    rows = [(file.name, file.size, file.sha256) for file in pushed.files]
    return Group(
        pairs({"dry run": "nothing was uploaded", **facts}),
        Text(""),
        grid(("file", "bytes", "sha256"), rows),
    )
