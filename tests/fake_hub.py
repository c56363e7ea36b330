"""A Hub in memory behind huggingface_hub's functions; every call must be one that the installed client takes."""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CommitInfo, constants
from huggingface_hub.utils import filter_repo_objects

Api = huggingface_hub.HfApi
download = huggingface_hub.snapshot_download


class FakeHub:
    """Repositories with branches of files; each commit has a number as its hash."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.heads: dict[tuple[str, str], str] = {}
        self.calls: list[str] = []
        self.snapshots: list[tuple[str, list[str]]] = []
        """After each commit: the branch and what it then holds."""
        self.tokens: list[object] = []
        self.fault: Callable[[str], None] = lambda name: None
        self.lies = False
        """Sizes that the Hub tells are wrong."""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def api(token: object = None) -> Any:
            self.tokens.append(token)
            return _Checked(self)

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "HfApi", api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def commit(self, repo_id: str, branch: str, files: dict[str, bytes]) -> str:
        self.branches.setdefault(repo_id, {}).setdefault(branch, {}).update(files)
        oid = f"{len(self.heads) + len(self.snapshots) + 1:040x}"
        self.heads[repo_id, branch] = oid
        self.snapshots.append((branch, sorted(self.branches[repo_id][branch])))
        return oid

    # -- HfApi --------------------------------------------------------------------------------------

    def repo_exists(self, repo_id: str) -> bool:
        return repo_id in self.branches

    def create_repo(self, repo_id: str, *, private: bool | None = None) -> None:
        self.private[repo_id] = bool(private)
        self.commit(repo_id, "main", {".gitattributes": b""})

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool = False) -> None:
        files = self.branches[repo_id]
        if branch not in files:
            files[branch] = dict(files["main"])

    def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> list[str]:
        return sorted(self.branches[repo_id][revision or "main"])

    def model_info(
        self, repo_id: str, *, revision: str | None = None, files_metadata: bool = False
    ) -> SimpleNamespace:
        branch = revision or "main"
        files = self.branches[repo_id][branch]
        siblings = [
            SimpleNamespace(
                rfilename=name,
                size=len(data) + self.lies,
                lfs=SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if name.endswith("rs") else None,
            )
            for name, data in files.items()
        ]
        return SimpleNamespace(
            sha=self.heads[repo_id, branch], private=self.private.get(repo_id, False), siblings=siblings
        )

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], revision: str, create_pr: bool,
        commit_message: str,
    ) -> CommitInfo:  # fmt: skip
        names = filter_repo_objects(
            [p.name for p in Path(folder_path).iterdir()], allow_patterns=allow_patterns
        )
        branch = revision
        if create_pr:
            branch = "refs/pr/1"
            self.branches[repo_id][branch] = dict(self.branches[repo_id][revision])
        files = {str(name): (Path(folder_path) / str(name)).read_bytes() for name in names}
        return self._done(repo_id, branch, files, commit_message, create_pr)

    def create_commit(
        self, repo_id: str, operations: list[Any], *, commit_message: str, revision: str, parent_commit: str
    ) -> CommitInfo:
        assert parent_commit == self.heads[repo_id, revision]
        files = {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}
        return self._done(repo_id, revision, files, commit_message, False)

    def _done(self, repo_id: str, branch: str, files: dict[str, bytes], message: str, pr: bool) -> CommitInfo:
        oid = self.commit(repo_id, branch, files)
        where = f"https://huggingface.co/{repo_id}"
        return CommitInfo(
            commit_url=f"{where}/commit/{oid}", commit_message=message, commit_description="", oid=oid,
            pr_url=f"{where}/discussions/1" if pr else None,
        )  # fmt: skip

    # -- snapshot_download --------------------------------------------------------------------------

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        inspect.signature(download).bind(repo_id, **options)
        self.calls.append("snapshot_download")
        folder = Path(options["local_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        branch = next(b for (r, b), oid in self.heads.items() if r == repo_id and oid == options["revision"])
        for name, data in sorted(self.branches[repo_id][branch].items()):
            wanted = any(fnmatch.fnmatch(name, p) for p in options["allow_patterns"])
            if wanted and name not in (options["ignore_patterns"] or []):
                self.fault(name)
                (folder / name).write_bytes(data)
        return str(folder)


class _Checked:
    """The fake's methods, called only as the real client can be."""

    def __init__(self, hub: FakeHub) -> None:
        self._hub = hub

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            inspect.signature(getattr(Api, name)).bind(self, *args, **options)
            self._hub.calls.append(name)
            self._hub.fault(name)
            return getattr(self._hub, name)(*args, **options)

        return call
