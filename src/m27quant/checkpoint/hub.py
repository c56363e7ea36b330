"""From what the user typed to a folder: a local path, or a Hub id pinned to one commit."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from m27quant.checkpoint.durable import NO_SPACE, raise_for_os_error
from m27quant.checkpoint.paths import existing
from m27quant.errors import CheckpointError, EnvironmentFault, UsageError, escape

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*", "README.md"]
WANTED = ["*.safetensors", *SMALL]
TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")


@dataclass(frozen=True, slots=True)
class Location:
    """A folder that holds a checkpoint, and where it came from."""

    folder: Path
    repo_id: str | None = None
    commit: str | None = None

    def describe(self) -> str:
        if self.repo_id is None:
            return f"local folder {escape(self.folder)}"
        return f"Hub repository {self.repo_id} at commit {self.commit}"


def locate(
    model: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    weights: bool = True,
) -> Location:
    """Find MODEL: an existing folder is local; `org/name[@revision]` (also `hf://...`) is on the Hub.

    Raises:
        UsageError: neither an existing folder nor a Hub id; a revision for a local folder.
        CheckpointError: a file where a folder is needed.
        EnvironmentFault: the Hub cannot be reached, refuses, or the cache lacks files while offline.

    With `weights` false only the small files of a Hub repository are fetched.
    """
    path = None if model.startswith("hf://") else existing(model)
    if path is not None and path.is_dir():
        if revision is not None:
            raise UsageError(
                f"--revision {escape(revision)} is for Hub ids; {escape(model)} is a local folder",
                hint="leave --revision out",
            )
        return Location(path.resolve())
    if path is not None:
        raise CheckpointError(
            f"{escape(model)}: a checkpoint is a folder, this is not",
            hint="name the folder that holds config.json",
        )
    repo_id, at, inline = model.removeprefix("hf://").partition("@")
    if model.startswith((".", "/", "~")) or not HUB_ID.fullmatch(repo_id):
        raise CheckpointError(
            f"{escape(model)}: no such folder, and not a Hub id (org/name)",
            hint="name the folder that holds config.json, or a repository such as MiniMaxAI/MiniMax-M2.7",
        )
    if at and revision not in (None, inline):
        raise UsageError(
            f"two revisions: @{escape(inline)} and --revision {escape(revision)}", hint="name one of them"
        )
    return _snapshot(repo_id, revision or inline or None, offline=offline, token=token, weights=weights)


def _snapshot(
    repo_id: str, revision: str | None, *, offline: bool, token: str | None, weights: bool
) -> Location:
    import huggingface_hub
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    with hub_faults(repo_id, revision, offline=offline):
        if not offline:  # pin the commit once, so that every file comes from it
            revision = huggingface_hub.HfApi(token=token).model_info(repo_id, revision=revision).sha
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            local_files_only=offline,
            allow_patterns=WANTED if weights else SMALL,
        )
    return Location(Path(folder), repo_id, revision if _is_commit(revision) else Path(folder).name)


@contextmanager
def hub_faults(
    repo_id: str, revision: str | None, *, offline: bool = False, again: str | None = None
) -> Iterator[None]:
    """Turn what the Hub's client raises into faults of ours, with what to do next.

    `again` is the hint where the network failed; without it how to fetch the repository later.

    Raises:
        CheckpointError: no Hub id at all.
        EnvironmentFault: all else: the Hub refuses or cannot be reached, a full disk, a cache that lacks files.
    """
    from huggingface_hub import constants, errors

    fetch = f"hf download {repo_id}" + (f" --revision {escape(revision)}" if revision else "")
    try:
        yield
    except errors.GatedRepoError:
        raise EnvironmentFault(
            f"{repo_id}: gated; access has to be granted first",
            hint="accept the terms on the model's page, then `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise EnvironmentFault(
            f"{repo_id}: no revision '{escape(revision)}'", hint="check --revision"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise EnvironmentFault(
            f"{repo_id}: not in the local cache, and offline mode is on"
            if offline
            else f"{repo_id}: the Hub cannot be reached",
            hint=f"fetch it where there is a network: {fetch}",
        ) from None
    except errors.RepositoryNotFoundError:
        raise EnvironmentFault(
            f"{repo_id}: no such repository on the Hub, or it is private",
            hint="check the name; `hf auth login` for private ones",
        ) from None
    except errors.HFValidationError as fault:
        raise CheckpointError(f"{repo_id}: not a Hub id ({escape(fault)})", hint="check the name") from None
    except (errors.HfHubHTTPError, OSError) as fault:
        if fault.errno in (*NO_SPACE, errno.EACCES, errno.EROFS):
            raise_for_os_error(fault, Path(fault.filename or constants.HF_HUB_CACHE))
        raise EnvironmentFault(
            f"{repo_id}: the Hub cannot be reached ({escape(type(fault).__name__)}: {escape(fault)})",
            hint=again or f"try again, or use --offline after `{fetch}`",
        ) from None
    except Exception as fault:
        # The Hub client's transport raises its own tree (httpx); all of it means the network failed.
        if type(fault).__module__.split(".")[0] in TRANSPORTS:
            raise EnvironmentFault(
                f"{repo_id}: the Hub cannot be reached ({escape(fault)})",
                hint=again or f"fetch it later: {fetch}",
            ) from None
        raise


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
