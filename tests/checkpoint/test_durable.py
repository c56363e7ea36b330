"""Durable files: the order of the system calls, and that a file is whole or not there whatever fails."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m27quant.checkpoint import durable
from m27quant.checkpoint.durable import (
    digests_of,
    durable_file,
    fault_point,
    move_durably,
    pwrite_all,
    sha256_of,
    sweep_temporaries,
    write_durably,
)
from m27quant.errors import EnvironmentFault

CALLS = ("open", "posix_fallocate", "pwrite", "fstat", "fsync", "close", "rename")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The system calls that are made, with the file they are made on."""
    made: list[tuple[str, str]] = []
    names: dict[int, str] = {}

    def record(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(first: Any, *rest: Any) -> Any:
            result = real(first, *rest)
            if call == "open":
                names[result] = "folder" if rest[0] & os.O_DIRECTORY else Path(first).name
            fd = result if call == "open" else first
            if fd in names or call == "rename":  # others may make calls too
                made.append((call, names.get(fd) or Path(first).name))
            return result

        return recorded

    for call in CALLS:
        monkeypatch.setattr(os, call, record(call, getattr(os, call)))
    return made


def test_reserved_written_synced_renamed_synced(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    write_durably(tmp_path / "x", b"data")
    temporary = f".tmp-{os.getpid()}-x"
    assert calls == [
        ("open", temporary),
        ("posix_fallocate", temporary),
        ("pwrite", temporary),
        ("fstat", temporary),
        ("fsync", temporary),
        ("close", temporary),
        ("rename", temporary),
        ("open", "folder"),
        ("fsync", "folder"),
        ("close", "folder"),
    ]


def test_moves_are_synced(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    (tmp_path / "a").write_text("x")
    move_durably(tmp_path / "a", tmp_path / "b")
    assert calls == [("rename", "a"), ("open", "folder"), ("fsync", "folder"), ("close", "folder")]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fstat", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_the_old_file_stays_when_anything_fails(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / "other").write_bytes(b"other")

    def fail(*args: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(EnvironmentFault) as raised:
        write_durably(tmp_path / "x", b"new and longer")
    monkeypatch.undo()
    assert str(tmp_path / "x") in raised.value.message
    assert raised.value.hint
    assert ("no space left" in raised.value.message) == (number in durable.NO_SPACE)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"old", "other": b"other"}


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_appears_when_the_block_fails(fault: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(fault), durable_file(tmp_path / "x", 4):
        raise fault
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_than_planned(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="size differs"), durable_file(tmp_path / "x", 4) as fd:
        os.pwrite(fd, b"12345", 0)
    assert list(tmp_path.iterdir()) == []


def test_writes_that_take_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    with durable_file(tmp_path / "x", 10) as fd:
        pwrite_all(fd, b"56789", 5)
        pwrite_all(fd, b"01234", 0)
    assert (tmp_path / "x").read_bytes() == b"0123456789"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o000, 0o666)])
def test_modes_follow_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_durably(tmp_path / "x", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


def test_empty_files_and_sums(tmp_path: Path) -> None:
    write_durably(tmp_path / "x", b"")
    assert digests_of(tmp_path / "x") == (sha256_of(tmp_path / "x"), "99aa06d3014798d86001c324468d497f")
    assert sha256_of(tmp_path / "x") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"theirs")
    (tmp_path / "x").symlink_to("target")
    write_durably(tmp_path / "x", b"ours")
    assert (tmp_path / "target").read_bytes() == b"theirs"
    assert not (tmp_path / "x").is_symlink()


def test_sweeping(tmp_path: Path) -> None:
    for name in (".tmp-1-x", ".tmp-", "x", ".tmpx"):
        (tmp_path / name).touch()
    sweep_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmpx", "x"]


def test_fault_points_do_nothing_outside_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M27QUANT_FAULT", "here:1:enospc")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    fault_point("here")
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "x")
    fault_point("there")
    with pytest.raises(OSError, match="No space left"):
        fault_point("here")
    fault_point("here")
