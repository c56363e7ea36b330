"""Disks that are full, or refuse: exit code 4, what is done is kept, --resume ends with the undisturbed bytes."""

from __future__ import annotations

import collections
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Case
from tests.faults.harness import Program, passes_for_a_checkpoint, tree
from tests.faults.test_crash import POINTS

NO_CHECK = [("without_disk_check",)]


def check_refusal(code: int, err: str, out: Path) -> None:
    assert code == 4, err
    assert "Traceback" not in err
    assert "error: " in err
    assert "--resume" in err
    assert not passes_for_a_checkpoint(out)


@pytest.mark.parametrize("point", sorted(POINTS))
def test_no_space_at_every_point(point: str, program: Program, case: Case, out: Path) -> None:
    count = collections.Counter(case.passed)[point]
    for number in sorted({1, 2, (count + 1) // 2, count - 1, count} & set(range(1, count + 1))):
        ended = program.run(*case.argv(out), env={"M27QUANT_FAULT": f"{point}:{number}:enospc"})
        if point.startswith("clean-up") or (point, number) == ("commit-document", count):
            assert ended.code == 4, ended.err  # the checkpoint has landed; what is left is to tidy up
        else:
            check_refusal(ended.code, ended.err, out)
        ended = program.run(*case.argv(out, "--resume"))
        assert (ended.code, tree(out)) == (0, case.undisturbed), (number, ended.err)
        shutil.rmtree(out)


@pytest.mark.parametrize("kilobytes", [1, 2, 4, 8, 16, 24])
def test_a_limit_of_file_size(kilobytes: int, program: Program, case: Case, out: Path) -> None:
    """RLIMIT_FSIZE, as quotas do it: EFBIG in the middle of a write."""
    largest = max(p.stat().st_size for p in case.undisturbed_folder.iterdir())
    assert largest > 24 * 1024
    limit = [("limit", "RLIMIT_FSIZE", kilobytes * 1024)]
    ended = program.run(*case.argv(out), setup=limit)
    check_refusal(ended.code, ended.err, out)
    ended = program.run(*case.argv(out, "--resume"))
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


@pytest.fixture
def mounted(out: Path) -> Iterator[Path]:
    """A folder to mount a small file system on."""
    folder = out.parent / "small"
    folder.mkdir()
    probe = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", folder], capture_output=True)
    if probe.returncode:
        pytest.skip("needs the permission to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def test_a_disk_that_fills_up(mounted: Path, program: Program, case: Case) -> None:
    """A real file system, a little larger every time: one run stops wherever the disk is full."""
    out, stops, sizes = mounted / "out", 0, range(4, 2000, 12)
    for kilobytes in sizes:
        remount(mounted, f"size={kilobytes}k")
        ended = program.run(*case.argv(out, "--resume"), setup=NO_CHECK)
        if ended.code == 0:
            break
        stops += 1
        check_refusal(ended.code, ended.err, out)
    assert tree(out) == case.undisturbed
    assert stops > 5


def test_a_disk_without_inodes(mounted: Path, program: Program, case: Case) -> None:
    out, stops = mounted / "out", 0
    for inodes in range(2, 60):
        remount(mounted, f"nr_inodes={inodes}")
        ended = program.run(*case.argv(out, "--resume"), setup=NO_CHECK)
        if ended.code == 0:
            break
        stops += 1
        check_refusal(ended.code, ended.err, out)
    assert tree(out) == case.undisturbed
    assert stops > 5


def test_too_small_a_disk_is_refused_at_once(mounted: Path, program: Program, case: Case) -> None:
    ended = program.run(*case.argv(mounted / "out"))
    assert ended.code == 4
    assert "0.00 GiB free, 0.06 GiB needed" in ended.err
    assert list(mounted.iterdir()) == []


def test_a_file_system_that_is_read_only(mounted: Path, program: Program, case: Case) -> None:
    remount(mounted, "ro")
    ended = program.run(*case.argv(mounted / "out"), setup=NO_CHECK)
    assert ended.code == 4
    assert f"{mounted}: not writable" in ended.err
    remount(mounted, "rw,size=1M")


def test_a_file_system_that_becomes_read_only(mounted: Path, program: Program, case: Case) -> None:
    out = mounted / "out"
    fault = {"M27QUANT_FAULT": "layer-computed:2"}
    assert program.run(*case.argv(out), env=fault, setup=NO_CHECK).code == 137
    remount(mounted, "ro")
    ended = program.run(*case.argv(out, "--resume"), setup=NO_CHECK)
    assert (ended.code, "not writable" in ended.err) == (4, True)
    remount(mounted, "rw")
    ended = program.run(*case.argv(out, "--resume"), setup=NO_CHECK)
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err
