"""`pull_checkpoint`: one commit of a Hub repository to a folder, which is a checkpoint only once it was verified."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m27quant.checkpoint.durable import (
    move_durably,
    raise_for_os_error,
    sha256_of,
    write_durably,
)
from m27quant.checkpoint.hub import HUB_ID, WANTED, hub_faults
from m27quant.checkpoint.lock import OutputLock
from m27quant.checkpoint.publishable import LAST
from m27quant.checkpoint.strict_json import read_object
from m27quant.checkpoint.workspace import PRIVATE
from m27quant.errors import CheckpointError, EnvironmentFault, M27Error, OutputError, UsageError, escape
from m27quant.progress import ProgressCallback
from m27quant.progress import ignore as nobody
from m27quant.verify.refuse import refuse_errors
from m27quant.verify.run import Level, verify_checkpoint

RECORD = "pull.json"
"""In OUT/.m27quant: which commit this is."""
STAGING = "pull"


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """How to pull."""

    revision: str | None = None
    verify: bool = True
    level: Level = "quick"
    offline: bool = False
    """From the Hub client's cache alone."""
    token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PullResult:
    """What was pulled."""

    repo_id: str
    revision: str | None
    """As it was asked for."""
    commit: str
    folder: str
    files: int
    total_bytes: int
    verified: str | None

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def pull_checkpoint(
    repo: str,
    out: str | os.PathLike[str],
    options: PullOptions | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: ProgressCallback = nobody,
) -> PullResult:
    """Download `org/name[@revision]` to the new folder `out`.

    Files arrive in OUT/.m27quant/pull; config.json and the index are moved to OUT last, after the verification.  The
    same call goes on with a download that was cut short.

    Raises:
        FindingsError: verify finds errors; OUT then holds no checkpoint.
        UsageError: not a Hub id, two revisions.
        CheckpointError: the repository holds no checkpoint, or a file that is not what the Hub says.
        OutputError: OUT holds something else, or another run is at it.
        EnvironmentFault: the Hub cannot be reached or refuses; no room.
    """
    options = options or PullOptions()
    repo_id, revision = _parse(repo, options.revision)
    folder = Path(out)
    private = folder / PRIVATE
    _refuse_foreign(folder)
    commit, sizes, digests = _resolve(repo_id, revision, options)
    say(f"Hub repository {repo_id} at commit {commit}")
    lock = OutputLock(private)
    try:
        private.mkdir(parents=True, exist_ok=True)
        lock.acquire(force=False)
    except OSError as fault:
        raise_for_os_error(fault, private)
    try:
        _claim(private, repo_id, commit)
        staging = private / STAGING
        _take_back(folder, staging, sizes)
        _download(repo_id, commit, staging, options)
        names = _arrived(staging, sizes, digests, check_digests=options.level == "full")
        if options.verify:
            _verify(staging, repo_id, commit, options, progress)
        total = _settle(staging, folder, names)
        _record(private, repo_id, commit, finished=True)
    finally:
        lock.release(forget=True)
    return PullResult(
        repo_id=repo_id,
        revision=revision,
        commit=commit,
        folder=escape(folder, 4096),
        files=len(names),
        total_bytes=total,
        verified=options.level if options.verify else None,
    )


def _parse(repo: str, revision: str | None) -> tuple[str, str | None]:
    repo_id, _, inline = repo.removeprefix("hf://").partition("@")
    if HUB_ID.fullmatch(repo_id) is None:
        raise UsageError(f"'{escape(repo)}' is not a Hub id (org/name or org/name@revision)")
    if inline and revision not in (None, inline):
        raise UsageError(
            f"two revisions: @{escape(inline)} and --revision {escape(revision)}", hint="name one of them"
        )
    return repo_id, revision or inline or None


def _refuse_foreign(folder: Path) -> None:
    """OUT is new, empty, or holds an unfinished pull alone."""
    try:
        if not folder.exists() and not folder.is_symlink():
            return
        if not folder.is_dir():
            raise OutputError(f"{escape(folder)}: not a folder", hint="name a new folder")
        if (folder / PRIVATE).is_symlink():
            raise OutputError(f"{escape(folder / PRIVATE)}: a link", hint="put a folder in its place")
        there = {path.name for path in folder.iterdir()}
    except OSError as fault:
        raise_for_os_error(fault, folder)
    unfinished = PRIVATE in there and not _read_record(folder / PRIVATE).get("finished", True)
    if there and not unfinished:
        raise OutputError(
            f"{escape(folder)}: there already, and not empty", hint="name a new folder, or remove this one"
        )


def _read_record(private: Path) -> dict[str, Any]:
    try:
        return read_object(private / RECORD)
    except (CheckpointError, EnvironmentFault):
        return {}


def _claim(private: Path, repo_id: str, commit: str) -> None:
    """Note whose download this is; one of another commit is not gone on with."""
    record = _read_record(private)
    mine = (record.get("repo_id"), record.get("commit")) == (repo_id, commit)
    if record and not mine:
        raise OutputError(
            f"{escape(private.parent)}: holds an unfinished pull of {escape(record.get('repo_id'))} at "
            f"{escape(record.get('commit'))}",
            hint="pull that commit with --revision, or name a new folder",
        )
    _record(private, repo_id, commit, finished=False)


def _record(private: Path, repo_id: str, commit: str, *, finished: bool) -> None:
    document = {"schema_version": 1, "repo_id": repo_id, "commit": commit, "finished": finished}
    write_durably(private / RECORD, json.dumps(document, indent=2).encode() + b"\n")


def _take_back(folder: Path, staging: Path, sizes: dict[str, int]) -> None:
    """Files of a pull that was stopped while it moved them to OUT go on being downloaded ones."""
    staging.mkdir(exist_ok=True)
    for name in sizes:
        if Path(name).name == name and (folder / name).is_file():
            move_durably(folder / name, staging / name)


# -- the Hub ---------------------------------------------------------------------------------------


def _resolve(
    repo_id: str, revision: str | None, options: PullOptions
) -> tuple[str, dict[str, int], dict[str, str]]:
    """The commit, and of each file its size and, where the Hub has it, its SHA-256."""
    import huggingface_hub
    from huggingface_hub import constants

    offline = options.offline or constants.HF_HUB_OFFLINE
    with hub_faults(repo_id, revision, offline=offline):
        if offline:
            found = huggingface_hub.snapshot_download(
                repo_id, revision=revision, local_files_only=True, allow_patterns=WANTED
            )
            return Path(found).name, {}, {}
        info = huggingface_hub.HfApi(token=options.token).model_info(
            repo_id, revision=revision, files_metadata=True
        )
    siblings = info.siblings or []
    sizes = {s.rfilename: s.size for s in siblings if s.size is not None}
    digests = {s.rfilename: s.lfs.sha256 for s in siblings if s.lfs is not None}
    if info.sha is None:
        raise EnvironmentFault(f"{repo_id}: the Hub names no commit", hint="try again")
    return info.sha, sizes, digests


def _download(repo_id: str, commit: str, staging: Path, options: PullOptions) -> None:
    """The weights first: without config.json and index the folder is no checkpoint to anybody."""
    import huggingface_hub
    from huggingface_hub import constants

    offline = options.offline or constants.HF_HUB_OFFLINE
    with hub_faults(repo_id, commit, offline=offline):
        if offline:
            cached = huggingface_hub.snapshot_download(
                repo_id, revision=commit, local_files_only=True, allow_patterns=WANTED
            )
            _copy(Path(cached), staging)
            return
        for patterns, ignored in ((WANTED, [*LAST]), ([*LAST], [])):
            huggingface_hub.snapshot_download(
                repo_id, revision=commit, token=options.token, local_dir=staging, allow_patterns=patterns,
                ignore_patterns=ignored or None,
            )  # fmt: skip


def _copy(cached: Path, staging: Path) -> None:
    """Out of the client's cache, where files are links."""
    try:
        staging.mkdir(exist_ok=True)
        for path in sorted(cached.iterdir(), key=lambda path: path.name in LAST):
            if path.is_file():
                shutil.copyfile(path, staging / path.name)
    except OSError as fault:
        raise_for_os_error(fault, staging)


def _arrived(
    staging: Path, sizes: dict[str, int], digests: dict[str, str], *, check_digests: bool
) -> list[str]:
    """Names of the files that are there, each of the size that the Hub says."""
    names = sorted(path.name for path in staging.iterdir() if path.is_file() and not path.is_symlink())
    for name in names:
        size = (staging / name).stat().st_size
        if size != sizes.get(name, size):
            raise CheckpointError(
                f"{escape(name)}: {size:,} bytes arrived, the Hub says {sizes[name]:,}", hint="pull again"
            )
        if check_digests and name in digests and sha256_of(staging / name) != digests[name]:
            raise CheckpointError(f"{escape(name)}: its SHA-256 is not the Hub's", hint="pull again")
    if missing := [name for name in LAST if name not in names]:
        raise CheckpointError(
            f"the repository has no {' and no '.join(missing)}: it holds no checkpoint in shards",
            hint="check the name and the revision",
        )
    return names


def _verify(
    staging: Path, repo_id: str, commit: str, options: PullOptions, progress: ProgressCallback
) -> None:
    """Of a faulty download, config.json and index go: nobody shall take it for a checkpoint."""
    try:
        result = verify_checkpoint(os.fspath(staging), level=options.level, progress=progress)
        refuse_errors(result, "not fit to be used; nothing was put in place", name=f"{repo_id}@{commit}")
    except M27Error:
        for name in LAST:
            (staging / name).unlink(missing_ok=True)
        raise


def _settle(staging: Path, folder: Path, names: list[str]) -> int:
    """Move everything to OUT, what makes it a checkpoint last; returns the bytes."""
    total = 0
    for name in sorted(names, key=lambda name: (name in LAST, name)):
        total += (staging / name).stat().st_size
        move_durably(staging / name, folder / name)
    shutil.rmtree(staging, ignore_errors=True)
    return total
