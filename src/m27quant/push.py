"""`push_checkpoint`: a verified checkpoint to the Hub, its weights first and config.json and index last."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from m27quant.checkpoint.durable import sha256_of
from m27quant.checkpoint.hub import HUB_ID, hub_faults
from m27quant.checkpoint.publishable import SHARD, PublishFile, files_to_publish
from m27quant.errors import CheckpointError, EnvironmentFault, OutputError, UsageError, escape
from m27quant.progress import Progress, ProgressCallback
from m27quant.progress import ignore as nobody
from m27quant.verify.locate import find_checkpoint
from m27quant.verify.refuse import refuse_errors
from m27quant.verify.run import Level, verify_checkpoint

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

MAIN = "main"
AGAIN = "push again: what has arrived is not sent twice"
DEFAULT_MESSAGE = "Upload an NVFP4 checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """How to push."""

    private: bool | None = None
    """Of a repository that is made; one that exists must agree.  None: as the Hub's settings have it."""
    revision: str = MAIN
    """Branch; made if it is not there."""
    create_pr: bool = False
    message: str = DEFAULT_MESSAGE
    verify: bool = True
    level: Level = "default"
    dry_run: bool = False
    """Verify, and say what would be uploaded; the Hub is not asked."""
    offline: bool = False
    token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadedFile:
    """One file of the checkpoint."""

    name: str
    size: int
    sha256: str | None
    """Known of a dry run alone: an upload computes it on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """What was uploaded, or would be."""

    checkpoint: str
    repo_id: str
    revision: str
    private: bool | None
    dry_run: bool
    verified: str | None
    """The level that passed; None where nothing was verified."""
    files: tuple[UploadedFile, ...]
    left_out: dict[str, str]
    total_bytes: int
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def push_checkpoint(
    checkpoint: str | os.PathLike[str],
    repo_id: str,
    options: PushOptions | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: ProgressCallback = nobody,
) -> PushResult:
    """Upload the checkpoint in a local folder to `org/name`.

    An upload that was cut short goes on where it was when the same is called again: the Hub's client skips what is
    there.  Until the last commit the repository has no config.json and no index of this checkpoint.

    Raises:
        FindingsError: verify finds errors, or the folder holds strangers, secrets or a card that does not hold.
        UsageError: not a Hub id; offline.
        CheckpointError: no checkpoint.
        OutputError: the repository holds other weights, or is public where a private one was asked for.
        EnvironmentFault: the Hub cannot be reached or refuses.
    """
    options = options or PushOptions()
    if HUB_ID.fullmatch(repo_id) is None:
        raise UsageError(f"'{escape(repo_id)}' is not a Hub id (org/name)")
    folder = find_checkpoint(os.fspath(checkpoint), offline=True).folder
    if not folder.is_dir():
        raise CheckpointError(f"{escape(folder)}: no such folder", hint="name the checkpoint's folder")
    if options.verify:
        result = verify_checkpoint(os.fspath(folder), level=options.level, progress=progress)
        refuse_errors(result, "not fit to be pushed")
    files, left_out = files_to_publish(folder)
    pushed = PushResult(
        checkpoint=escape(folder, 4096),
        repo_id=repo_id,
        revision=options.revision,
        private=options.private,
        dry_run=options.dry_run,
        verified=options.level if options.verify else None,
        files=tuple(
            UploadedFile(name=file.name, size=file.size, sha256=digest)
            for file, digest in zip(files, _digests(files, options.dry_run, progress), strict=True)
        ),
        left_out=left_out,
        total_bytes=sum(file.size for file in files),
    )
    return pushed if options.dry_run else _upload(pushed, files, options, say)


def _digests(files: list[PublishFile], wanted: bool, progress: ProgressCallback) -> list[str | None]:
    if not wanted:
        return [None] * len(files)
    total, done = max(1, sum(file.size for file in files)), 0
    digests: list[str | None] = []
    for file in files:
        try:
            digests.append(sha256_of(file.path))
        except OSError as fault:
            raise EnvironmentFault(
                f"{escape(file.path)}: {fault.strerror}", hint="see its permissions"
            ) from None
        done += file.size
        progress(Progress(stage="hashing", fraction=done / total))
    return digests


# -- the Hub ---------------------------------------------------------------------------------------


def _upload(
    pushed: PushResult, files: list[PublishFile], options: PushOptions, say: Callable[[str], None]
) -> PushResult:
    import huggingface_hub
    from huggingface_hub import constants

    if options.offline or constants.HF_HUB_OFFLINE:
        raise UsageError("offline: nothing can be pushed", hint="add --dry-run, or unset HF_HUB_OFFLINE")
    api = huggingface_hub.HfApi(token=options.token)
    with hub_faults(pushed.repo_id, options.revision, again=AGAIN), _refusals(pushed.repo_id):
        _prepare_repository(api, pushed, files, options, say)
        weights = [file.name for file in files if not file.is_last]
        say(f"uploading {len(weights)} files to {pushed.repo_id}; config.json and index follow at the end")
        first = api.upload_folder(
            repo_id=pushed.repo_id,
            folder_path=files[0].path.parent,
            allow_patterns=[_literally(name) for name in weights],
            revision=options.revision,
            create_pr=options.create_pr,
            commit_message=f"{options.message}: weights",
        )
        branch = first.pr_revision if options.create_pr else options.revision
        last = _commit_last(api, pushed.repo_id, files, branch or options.revision, options.message, first)
    return replace(
        pushed,
        commit=last.oid,
        url=f"{constants.ENDPOINT}/{pushed.repo_id}/tree/{last.oid}",
        pull_request=first.pr_url if options.create_pr else None,
    )


def _prepare_repository(
    api: HfApi,
    pushed: PushResult,
    files: list[PublishFile],
    options: PushOptions,
    say: Callable[[str], None],
) -> None:
    """Make repository and branch where they are not there; refuse one that holds another checkpoint."""
    repo_id = pushed.repo_id
    if not api.repo_exists(repo_id):
        api.create_repo(repo_id, private=options.private)
        say(f"made the repository {repo_id}")
    elif options.private and api.model_info(repo_id).private is False:
        raise OutputError(
            f"{repo_id}: the repository is public",
            hint="make it private on the Hub first, or leave --private out",
        )
    if options.revision != MAIN and not options.create_pr:
        api.create_branch(repo_id, branch=options.revision, exist_ok=True)
    ours = {file.name for file in files}
    there = api.list_repo_files(repo_id, revision=options.revision)
    others = sorted(name for name in there if name.endswith(SHARD) and name not in ours)
    if others:
        raise OutputError(
            f"{repo_id}: holds {len(others)} weight files that are not this checkpoint's, such as {escape(others[0])}",
            hint="take another repository or --revision, or delete them there first",
        )


def _commit_last(
    api: HfApi, repo_id: str, files: list[PublishFile], branch: str, message: str, first: CommitInfo
) -> CommitInfo:
    """The commit that makes it a checkpoint; refused by the Hub where somebody else has written in between."""
    from huggingface_hub import CommitOperationAdd

    added = [
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.path)
        for file in files
        if file.is_last
    ]
    return api.create_commit(
        repo_id, added, commit_message=message, revision=branch, parent_commit=first.oid or None
    )  # fmt: skip


def _literally(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """What the Hub answers to somebody who may not write, or who was overtaken."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as fault:
        status = getattr(fault.response, "status_code", None)
        if status in (401, 403):
            raise EnvironmentFault(
                f"{repo_id}: the Hub refuses to be written to ({status})",
                hint="`hf auth login` with a token that may write there, or set HF_TOKEN",
            ) from None
        if status == 412:
            raise EnvironmentFault(
                f"{repo_id}: somebody else has committed while the upload ran",
                hint="look at the repository, then push again",
            ) from None
        raise
