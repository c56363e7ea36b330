"""MODEL as the user types it: a folder, or a Hub id pinned to one commit; the Hub's faults in one line each."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from m27quant.checkpoint.hub import SMALL, WANTED, Location, locate
from m27quant.checkpoint.source import Source
from m27quant.errors import CheckpointError, EnvironmentFault, M27Error, UsageError
from tests.checkpoints import Shape, write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A Hub that moves on after every question."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[Any, ...]] = []
        self.fetched: list[dict[str, Any]] = []
        self.fault: Callable[[], Exception] | None = None
        self.fetch_fault: Callable[[], Exception] | None = None

    def model_info(self, repo_id: str, revision: str | None = None) -> SimpleNamespace:
        self.asked.append((repo_id, revision))
        if self.fault:
            raise self.fault()
        return SimpleNamespace(sha=COMMIT if len(self.asked) == 1 else "f" * 40)

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.fetched.append({"repo_id": repo_id, **options})
        if self.fetch_fault:
            raise self.fetch_fault()
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "snapshots" / COMMIT)
    hub.folder.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


def test_the_commit_is_asked_once_and_pinned(hub: Hub) -> None:
    location = locate("org/name", token="secret")
    assert location == Location(hub.folder, "org/name", COMMIT)
    assert COMMIT in location.describe()
    assert hub.asked == [("org/name", None)]
    assert hub.fetched == [
        {
            "repo_id": "org/name",
            "revision": COMMIT,
            "token": "secret",
            "local_files_only": False,
            "allow_patterns": WANTED,
        }
    ]


@pytest.mark.parametrize(
    ("model", "revision"),
    [("org/name@v1", None), ("org/name", "v1"), ("org/name@v1", "v1"), ("hf://org/name@v1", None)],
)
def test_revisions(model: str, revision: str | None, hub: Hub) -> None:
    assert locate(model, revision=revision).commit == COMMIT
    assert hub.asked == [("org/name", "v1")]


def test_two_revisions_are_one_too_many(hub: Hub) -> None:
    with pytest.raises(UsageError, match="two revisions: @a and --revision b") as raised:
        locate("org/name@a", revision="b")
    assert raised.value.hint
    assert hub.asked == []


def test_offline_asks_nobody(hub: Hub) -> None:
    location = locate("org/name", offline=True)
    assert (hub.asked, location.commit) == ([], COMMIT)
    assert hub.fetched[0]["local_files_only"] is True


def test_only_the_small_files_for_a_dry_run(hub: Hub) -> None:
    locate("org/name", weights=False)
    assert hub.fetched[0]["allow_patterns"] == SMALL
    assert not any("safetensors" in p for p in SMALL)


def http(kind: type[Exception], message: str = "x") -> Callable[[], Exception]:
    return lambda: kind(message, response=SimpleNamespace(headers={}, request=None))  # type: ignore[call-arg]


class ConnectError(Exception):
    """As the Hub client's transport raises it."""


ConnectError.__module__ = "httpx2"

FAULTS: dict[str, tuple[Callable[[], Exception], str, str]] = {
    "gated": (http(errors.GatedRepoError), "org/name: gated", "hf auth login"),
    "no repository": (http(errors.RepositoryNotFoundError), "no such repository on the Hub, or it is private", "name"),
    "no revision": (http(errors.RevisionNotFoundError), "no revision 'v\\x1b1'", "--revision"),
    "500": (http(errors.HfHubHTTPError, "500\nError \x1b[2J"), "cannot be reached (HfHubHTTPError: 500", "again"),
    "no network": (lambda: ConnectError("[Errno -2] Name or service not known"), "cannot be reached", "hf download"),
    "refused": (lambda: ConnectionRefusedError(111, "Connection refused"), "cannot be reached", "again"),
    "timeout": (lambda: TimeoutError("timed out"), "cannot be reached", "again"),
    "offline mode": (lambda: errors.OfflineModeIsEnabled("offline"), "cannot be reached", "again"),
    "disk full": (lambda: OSError(errno.ENOSPC, "No space left", "/cache/x"), "/cache/x: no space left", "free"),
    "cache read-only": (lambda: PermissionError(errno.EACCES, "Denied", "/c/x"), "/c/x: cannot be written", "perm"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("at", ["fault", "fetch_fault"])
def test_faults_are_one_line_and_a_next_step(name: str, at: str, hub: Hub) -> None:
    fault, says, hint = FAULTS[name]
    setattr(hub, at, fault)
    with pytest.raises(EnvironmentFault) as raised:
        locate("org/name", revision="v\x1b1")
    if name != "no revision" or at == "fault":
        assert says in raised.value.message
    assert raised.value.message.isprintable()
    assert hint in (raised.value.hint or "")


def test_not_cached_and_offline(hub: Hub) -> None:
    hub.fetch_fault = lambda: errors.LocalEntryNotFoundError("not found")
    with pytest.raises(EnvironmentFault, match="not in the local cache, and offline mode is on") as raised:
        locate("org/name@v1", offline=True)
    assert "hf download org/name --revision v1" in (raised.value.hint or "")


def test_an_id_that_the_hub_refuses(hub: Hub) -> None:
    hub.fault = lambda: errors.HFValidationError("Cannot have -- or ..")
    with pytest.raises(CheckpointError, match="not a Hub id") as raised:
        locate("org/na--me")
    assert raised.value.hint


def test_a_bug_of_ours_stays_one(hub: Hub) -> None:
    hub.fault = lambda: ZeroDivisionError("x")
    with pytest.raises(ZeroDivisionError):
        locate("org/name")


def test_a_cache_that_lacks_shards(hub: Hub) -> None:
    """Partially downloaded: the missing files by name, and how to fetch them."""
    shutil.copytree(
        write_checkpoint(hub.folder.parent / "m", Shape(num_hidden_layers=1)), hub.folder, dirs_exist_ok=True
    )
    for path in sorted(hub.folder.glob("*.safetensors"))[1:]:
        path.unlink()
    with pytest.raises(EnvironmentFault) as raised:
        Source(locate("org/name", offline=True))
    assert (
        "2 of the index's 3 shards are missing: model-00001-of-00005.safetensors, model-00002"
        in raised.value.message
    )
    assert f"hf download org/name --revision {COMMIT}" in (raised.value.hint or "")


def test_a_download_that_was_cut_short(hub: Hub) -> None:
    """The Hub client checks sizes; a file that is cut all the same is named, with the command to fetch it anew."""
    shutil.copytree(
        write_checkpoint(hub.folder.parent / "m", Shape(num_hidden_layers=1)), hub.folder, dirs_exist_ok=True
    )
    path = sorted(hub.folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00005.safetensors: truncated") as raised:
        Source(locate("org/name"))
    assert raised.value.hint == "download the file again"


def test_a_folder_goes_before_the_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate("org/name") == Location(tmp_path / "org" / "name")
    assert hub.asked == []
    assert locate("hf://org/name").repo_id == "org/name"
    with pytest.raises(UsageError, match="--revision v1 is for Hub ids"):
        locate("org/name", revision="v1")


@pytest.mark.parametrize(
    "model", ["", "name", "a/b/c", "/org/name", "./org", "~/org", "org/", "/", "-o/x", "o rg/x", "org/x\n"]
)
def test_what_is_no_id(model: str, hub: Hub) -> None:
    with pytest.raises(M27Error) as raised:
        locate(model.replace("/", "/gone-") if model == "/" else model)
    assert raised.value.exit_code == 3
    assert raised.value.hint
    assert hub.asked == []


def test_a_file_is_no_checkpoint(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a checkpoint is a folder, this is not"):
        locate("file")
