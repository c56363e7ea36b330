"""The journal: what was appended is read back, and damage is either a torn end or an error, never another entry."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m27quant.checkpoint.journal import Journal
from m27quant.errors import EnvironmentFault, M27Error
from tests.checkpoint.common import check_fault, outcome

STEPS = [
    {"step": "begin", "fingerprint": {"z": "ü\u202e", "a": [1, 2.5, None]}},
    {"step": "unit", "name": "embed", "files": [{"name": "x", "size": 3}]},
    {"step": "unit", "name": "layer-0000", "record": {"b": 1e-300, "a": True}},
    {"step": "commit"},
]


def written(path: Path) -> bytes:
    journal = Journal(path)
    for step in STEPS:
        journal.append(**step)  # type: ignore[arg-type]
    journal.close()
    return path.read_bytes()


def read(path: Path) -> list[dict[str, object]]:
    journal = Journal(path)
    journal.close()
    return journal.entries


def test_entries_come_back_in_order(tmp_path: Path) -> None:
    written(tmp_path / "j")
    assert read(tmp_path / "j") == STEPS
    journal = Journal(tmp_path / "j")
    assert journal.find("unit") == STEPS[1]
    assert journal.find("unit", name="layer-0000") == STEPS[2]
    assert journal.find("unit", name="gone") is None
    assert journal.all("unit") == STEPS[1:3]
    journal.append("more")
    journal.close()
    assert read(tmp_path / "j") == [*STEPS, {"step": "more"}]


def test_a_run_sees_its_entries_as_the_next_one_will(tmp_path: Path) -> None:
    """Down to the order of keys, so that a resumed run writes the same report."""
    journal = Journal(tmp_path / "j")
    for step in STEPS:
        journal.append(**step)  # type: ignore[arg-type]
    journal.close()
    again = read(tmp_path / "j")
    assert repr(journal.entries) == repr(again)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 2000))
def test_cut_anywhere(tmp_path: Path, cut: int) -> None:
    """Whole lines are read; what is left is cut off, and the journal can go on."""
    path = tmp_path / "j"
    path.unlink(missing_ok=True)
    data = written(path)
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    assert read(path) == STEPS[:whole]
    journal = Journal(path)
    journal.append("more")
    journal.close()
    assert read(path) == [*STEPS[:whole], {"step": "more"}]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(at=st.integers(0, 2000), bit=st.integers(0, 7))
def test_any_flipped_bit(tmp_path: Path, at: int, bit: int) -> None:
    """Never an entry that was not written: an error, a shorter journal, or no difference in meaning."""
    path = tmp_path / "j"
    path.unlink(missing_ok=True)
    data = bytearray(written(path))
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    entries = outcome(lambda: read(path))
    if isinstance(entries, M27Error):
        assert "damaged at line" in entries.message
        check_fault(entries)
    else:
        assert entries in (STEPS, STEPS[:3], STEPS[:2])  # a newline lost joins the last two lines


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "j").write_bytes(data)
    entries = outcome(lambda: read(tmp_path / "j"))
    if isinstance(entries, M27Error):
        check_fault(entries)
    else:
        assert entries == []


def test_a_write_that_takes_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nearly full disk may take a few bytes at a time and say so only by the count."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    written(tmp_path / "j")
    assert read(tmp_path / "j") == STEPS


def test_a_write_that_fails_after_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("begin")
    real, calls = os.write, []

    def full(fd: int, data: bytes) -> int:
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(fd, data[:5])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(EnvironmentFault, match="no space left"):
        journal.append("unit")
    assert journal.entries == [{"step": "begin"}]
    journal.close()
    assert read(tmp_path / "j") == [{"step": "begin"}]


def test_a_journal_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        Journal(tmp_path / "gone" / "j")
    (tmp_path / "folder").mkdir()
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        Journal(tmp_path / "folder")
