"""`m27quant verify org/name`: the snapshot in the Hub's cache, its commit said; nothing is fetched for --quick."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from m27quant import verify_checkpoint
from m27quant.cli.app import main
from m27quant.errors import EnvironmentFault

Call = Callable[..., tuple[int, str, str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code, stdout and stderr of `m27quant ...`."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        code = main([*map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def snapshot(nvfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint as the Hub's client lays it into its cache: links into a folder of blobs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", _no_network)
    home = tmp_path / "hub" / "models--org--name"
    blobs, folder = home / "blobs", home / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(p for p in sorted(nvfp4.iterdir()) if p.is_file()):
        blob = blobs / f"{number:040x}"
        shutil.copy(path, blob)
        (folder / path.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.chdir(tmp_path)
    return folder


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network in tests")


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("org/name", ["--quick"]),
        ("hf://org/name", ["--quick"]),
        ("org/name@main", ["--quick"]),
        (f"org/name@{COMMIT}", ["--offline"]),
        ("org/name", ["--offline", "--full"]),
    ],
)
def test_what_the_cache_has_is_verified(name: str, level: list[str], snapshot: Path, call: Call) -> None:
    code, out, err = call("verify", name, *level, "--fail-on", "warning")
    assert code == 0, err
    assert out.splitlines()[0].split() == ["checkpoint", f"org/name@{COMMIT}"]
    assert f"checkpoint: Hub repository org/name at commit {COMMIT}" in err
    document = json.loads(call("verify", name, *level, "--json")[1])
    assert document["checkpoint"] == f"org/name@{COMMIT}"


def test_revision_is_the_checkpoints_where_there_is_no_source(snapshot: Path, call: Call) -> None:
    assert call("verify", "org/name", "--quick", "--revision", "main")[0] == 0
    code, _, err = call("verify", "org/name", "--quick", "--revision", "other")
    assert code == 4
    assert "hint: fetch it first: hf download org/name --revision other" in err


def test_quick_downloads_nothing(snapshot: Path, call: Call) -> None:
    code, out, err = call("verify", "org/other", "--quick")
    assert (code, out) == (4, "")
    assert "hint: fetch it first: hf download org/other" in err
    lost = next(snapshot.glob("*.safetensors"))
    lost.unlink()
    for flags in (["--quick"], ["--offline"]):
        code, out, err = call("verify", "org/name", *flags)
        assert (code, out) == (4, "")
        assert "1 of its shards are not in the local cache" in err
        assert "hf download org/name" in err


def test_without_a_network_the_fault_is_the_machines(snapshot: Path, call: Call) -> None:
    code, out, err = call("verify", "org/other")
    assert (code, out) == (4, "")
    assert "org/other: no such folder, and as a Hub id: " in err
    assert "hf download org/other" in err


def test_a_folder_that_exists_is_never_the_hubs(nvfp4: Path, snapshot: Path, call: Call) -> None:
    shutil.copytree(nvfp4, "org/name")
    code, out, err = call("verify", "org/name", "--quick")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["checkpoint", "org/name"]
    code, _, err = call("verify", "org/nane", "--quick")  # a slip beside it
    assert code == 3
    assert "no such folder" in err
    assert call("verify", "hf://org/name", "--quick")[1].splitlines()[0].endswith(COMMIT)
    code, _, err = call("verify", "org/name", "--quick", "--revision", "main")
    assert code == 2
    assert "is a local folder" in err


def test_report_and_inspect_take_it_too(snapshot: Path, call: Call, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    code, _, err = call("report", "org/name", "-o", page, "--offline")
    assert code == 0, err
    assert COMMIT in page.read_text()
    assert call("inspect", "org/name")[0] == 0


def test_from_python(snapshot: Path) -> None:
    assert verify_checkpoint("org/name", level="quick").checkpoint == f"org/name@{COMMIT}"
    with pytest.raises(EnvironmentFault):
        verify_checkpoint("org/other", level="quick")
