"""OUT's private folder, in one process: who holds the lock, what is left when a run gives up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m27quant.checkpoint.workspace import Workspace, _file_names, check_same
from m27quant.errors import EnvironmentFault, OutputError, UsageError

INPUTS = {"a": 1, "b": [1, 2], "c": None}


def opened(out: Path, **flags: bool) -> Workspace:
    workspace = Workspace(out)
    workspace.open(INPUTS, **({"resume": False, "overwrite": False} | flags))
    return workspace


def test_a_run_without_work_leaves_nothing(tmp_path: Path) -> None:
    for out in (tmp_path / "a" / "b" / "out", tmp_path / "out"):
        workspace = opened(out)
        assert (out / ".m27quant" / "journal.jsonl").exists()
        workspace.abandon()
        workspace.close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    opened(tmp_path / "there").abandon()
    assert list((tmp_path / "there").iterdir()) == []


def test_folders_that_somebody_uses_meanwhile_stay(tmp_path: Path) -> None:
    workspace = opened(tmp_path / "a" / "out")
    (tmp_path / "a" / "theirs").write_text("x")
    (tmp_path / "a" / "out" / "theirs").write_text("x")
    workspace.abandon()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "a",
        "a/out",
        "a/out/theirs",
        "a/theirs",
    ]


def test_a_run_with_work_is_kept(tmp_path: Path) -> None:
    workspace = opened(tmp_path / "out")
    workspace.journal.append("unit", name="x", files=[])
    workspace.abandon()
    again = opened(tmp_path / "out", resume=True)
    assert again.journal.find("unit") == {"step": "unit", "name": "x", "files": []}
    again.close()


def test_one_at_a_time(tmp_path: Path) -> None:
    first = opened(tmp_path / "out")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match=f"process {os.getpid()} on "):
            opened(tmp_path / "out", **flags)
        with pytest.raises(OutputError, match="another run is writing here"):
            Workspace(tmp_path / "out").check(resume=False, overwrite=False)
    assert (tmp_path / "out" / ".m27quant" / "journal.jsonl").exists(), "the first run's"
    first.journal.append("unit", name="x", files=[])
    first.close()
    opened(tmp_path / "out", resume=True).close()


def test_other_inputs_change_nothing(tmp_path: Path) -> None:
    opened(tmp_path / "out").close()  # begun, nothing done: as after a kill
    journal = (tmp_path / "out" / ".m27quant" / "journal.jsonl").read_bytes()
    workspace = Workspace(tmp_path / "out")
    with pytest.raises(UsageError, match=r"b: \[1, 2\] then, \[1, 3\] now"):
        workspace.open(INPUTS | {"b": [1, 3]}, resume=True, overwrite=False)
    assert (tmp_path / "out" / ".m27quant" / "journal.jsonl").read_bytes() == journal
    opened(tmp_path / "out", resume=True).abandon()


def test_an_out_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault):
        opened(tmp_path / "file" / "a" / "out")
    with pytest.raises(EnvironmentFault, match="File name too long"):
        opened(tmp_path / "made" / ("n" * 300))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_every_difference_is_listed() -> None:
    check_same(INPUTS, dict(reversed(INPUTS.items())))
    with pytest.raises(UsageError) as raised:
        check_same(INPUTS, {"a": 2, "b": [1, 2], "d": "\x1b[2J"})
    assert raised.value.message.endswith(
        "a: 1 then, 2 now; c: null then, null now; d: null then, \\x1b[2J now"
    ) or (raised.value.message.endswith("a: 1 then, 2 now; d: null then, \\x1b[2J now"))
    assert raised.value.hint


@given(
    st.lists(
        st.text(max_size=5) | st.integers() | st.none() | st.sampled_from(["..", "../x", "/x", "n" * 300])
    )
)
def test_file_names_are_plain(names: list[object]) -> None:
    for name in _file_names(names):
        path = Path("/out") / name
        assert path.parent == Path("/out")
        assert path.name == name


@pytest.mark.parametrize("names", [None, 7, "all", {"a": 1}])
def test_file_names_of_what_is_no_list(names: object) -> None:
    assert _file_names(names) == []
