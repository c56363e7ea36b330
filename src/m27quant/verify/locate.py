"""From what the user typed to the folder that is verified: one that exists, or a Hub id's snapshot on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from m27quant.checkpoint.hub import HUB_ID, Location, locate
from m27quant.checkpoint.source import INDEX
from m27quant.checkpoint.strict_json import MAX_INDEX_BYTES, parse, read_bytes
from m27quant.errors import CheckpointError, EnvironmentFault, UsageError, escape


def find_checkpoint(
    checkpoint: str,
    *,
    headers_only: bool = False,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Location:
    """A folder is taken as it is typed; what is none, and looks like `org/name[@revision]`, is looked up on the Hub.

    With `headers_only` nothing is downloaded: a whole snapshot must lie in the cache already.

    Raises:
        UsageError: a revision for a local folder.
        CheckpointError: neither a folder nor a Hub id.
        EnvironmentFault: the Hub cannot be reached or refuses, or the cache lacks files.
    """
    if not _is_hub_id(checkpoint):
        if revision is not None:
            raise UsageError(
                f"--revision {escape(revision)} is for Hub ids: {escape(checkpoint)} is a local folder, "
                "and there is no --source",
                hint="leave --revision out",
            )
        return Location(Path(checkpoint))
    if not headers_only:
        say(f"checkpoint: {escape(checkpoint)} is no folder here; taking it from the Hub")
    try:
        location = locate(checkpoint, revision=revision, offline=offline or headers_only, token=token)
    except EnvironmentFault as fault:
        if headers_only:
            raise _not_here(checkpoint, revision) from None
        raise EnvironmentFault(
            f"{escape(checkpoint)}: no such folder, and as a Hub id: {fault.message}", hint=fault.hint
        ) from None
    if (headers_only or offline) and (missing := _missing_shards(location.folder)):
        raise _not_here(checkpoint, revision, missing)
    say(f"checkpoint: {location.describe()}")
    return location


def _is_hub_id(checkpoint: str) -> bool:
    """Not what exists, nor what lies in a folder that does: `out/m27` beside a folder `out` is a slip of the pen."""
    if checkpoint.startswith("hf://"):
        return True
    repo_id, _, _ = checkpoint.partition("@")
    if not HUB_ID.fullmatch(repo_id):
        return False
    try:
        return not Path(checkpoint).exists() and not Path(checkpoint).parent.is_dir()
    except (OSError, ValueError):
        return False


def _not_here(checkpoint: str, revision: str | None, missing: int = 0) -> EnvironmentFault:
    repo_id, _, inline = checkpoint.removeprefix("hf://").partition("@")
    at = revision or inline
    what = f"{missing:,} of its shards are not" if missing else "it is not"
    return EnvironmentFault(
        f"{escape(checkpoint)}: no such folder, and as a Hub id: {what} in the local cache; "
        "nothing is downloaded offline or for --quick",
        hint=f"fetch it first: hf download {escape(repo_id)}" + (f" --revision {escape(at)}" if at else ""),
    )


def _missing_shards(folder: Path) -> int:
    """How many files the index names that the snapshot lacks; an index that cannot be read is a check's to report."""
    try:
        index = parse(read_bytes(folder / INDEX, MAX_INDEX_BYTES), INDEX)
        names = {str(name) for name in index["weight_map"].values()}
        return sum(not (folder / name).exists() for name in names if Path(name).name == name)
    except (CheckpointError, EnvironmentFault, KeyError, TypeError, AttributeError, ValueError, OSError):
        return 0
