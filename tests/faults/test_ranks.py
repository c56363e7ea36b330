"""Several ranks as processes: the bytes of one, whoever is killed and however many go on afterwards."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Case
from tests.faults.harness import (
    KILLED,
    SMALL_CHUNKS,
    Program,
    launch,
    passes_for_a_checkpoint,
    together,
    tree,
    units_done,
    until,
    visible,
)

SLOW = ("slowly", 0.05)


@pytest.fixture(scope="module")
def expected(program: Program, case: Case, fast_folder: Path) -> dict[str, str]:
    """What one process makes of the case in small chunks."""
    out = fast_folder / "in-small-chunks"
    assert program.run(*case.argv(out), setup=[SMALL_CHUNKS]).code == 0
    return tree(out)


def resumes(program: Program, case: Case, out: Path, size: int, expected: dict[str, str]) -> None:
    """`--resume` on `size` ranks ends well, with the expected files and no other."""
    ended = together(program, case.argv(out, "--resume"), size)
    assert [e.code for e in ended] == [0] * size, [e.err for e in ended]
    assert tree(out) == expected


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_gives_the_bytes_of_one(
    size: int, program: Program, case: Case, out: Path, expected: dict[str, str]
) -> None:
    ended = together(program, case.argv(out), size)
    assert [e.code for e in ended] == [0] * size, [e.err for e in ended]
    assert tree(out) == expected
    assert ended[0].out.startswith("done")
    assert [(e.out, e.err) for e in ended[1:]] == [("", "")] * (size - 1), "one of them talks"


def test_more_ranks_than_chunks_and_experts(program: Program, case: Case, out: Path, tmp_path: Path) -> None:
    options = ("--moe-calib", "natural", "--max-shard-size", "4kB")
    assert program.run(*case.argv(tmp_path / "one", *options), setup=[SMALL_CHUNKS]).code == 0
    ended = together(program, case.argv(out, *options), 7)
    assert [e.code for e in ended] == [0] * 7, [e.err for e in ended]
    assert tree(out) == tree(tmp_path / "one")


def test_calibrated_by_two_packed_by_three(
    program: Program, case: Case, out: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    home = tmp_path / "calibration"
    ended = together(program, case.argv(home, "--calibrate-only"), 2)
    assert [e.code for e in ended] == [0, 0], [e.err for e in ended]
    argv = ("quantize", str(case.model), str(out), "--ranges", str(home / "calibration.json"))
    ended = together(program, argv, 3)
    assert [e.code for e in ended] == [0] * 3, [e.err for e in ended]
    assert tree(out) == expected


def test_a_rank_that_is_killed_stops_all_and_is_named(
    program: Program, case: Case, out: Path, expected: dict[str, str]
) -> None:
    ranks = launch(program, case.argv(out), 3, setup=[SLOW])
    until(lambda: units_done(out) >= 2)
    ranks[2].kill()
    killed = time.monotonic()
    ended = [rank.wait() for rank in ranks[:2]]
    assert time.monotonic() - killed < 10, "no timeout has to pass"
    assert [e.code for e in ended] == [4, 4], [e.err for e in ended]
    assert f"rank 2 of 3 (process {ranks[2].pid} on {socket.gethostname()}) is gone" in ended[0].err
    assert "--resume" in ended[0].err
    assert ended[1].err == ""
    assert visible(out) == {}
    resumes(program, case, out, 2, expected)


def test_the_second_speaks_where_the_first_is_killed(
    program: Program, case: Case, out: Path, expected: dict[str, str]
) -> None:
    ranks = launch(program, case.argv(out), 3, setup=[SLOW])
    until(lambda: units_done(out) >= 2)
    ranks[0].kill()
    ended = [rank.wait() for rank in ranks[1:]]
    assert [e.code for e in ended] == [4, 4], [e.err for e in ended]
    assert "rank 0 of 3" in ended[0].err
    assert "is gone" in ended[0].err
    assert ended[1].err == ""
    ended[0] = program.run(*case.argv(out, "--resume"), setup=[SMALL_CHUNKS])
    assert (ended[0].code, tree(out)) == (0, expected), ended[0].err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_where_they_can_go_on(
    rank: int, program: Program, case: Case, out: Path, expected: dict[str, str]
) -> None:
    ranks = launch(program, case.argv(out), 2, setup=[SLOW])
    until(lambda: units_done(out) >= 2)
    ranks[rank].send(signal.SIGTERM)
    ended = [r.wait() for r in ranks]
    assert [e.code for e in ended] == [143, 143], [e.err for e in ended]
    assert "stopped by SIGTERM" in ended[0].err
    assert "torchrun --nproc-per-node 2 -m m27quant quantize" in ended[0].err
    assert "Traceback" not in ended[0].err + ended[1].err
    resumes(program, case, out, 4, expected)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ["tensor-written:5", "tensor-written:30"])
def test_a_full_disk_on_one_rank(
    rank: int, point: str, program: Program, case: Case, out: Path, expected: dict[str, str]
) -> None:
    fault = {rank: {"env": {"M27QUANT_FAULT": f"{point}:enospc"}}}
    ended = together(program, case.argv(out), 2, only=fault)
    assert [e.code for e in ended] == [4, 4], [e.err for e in ended]
    assert "no space left" in ended[0].err
    assert ("rank 1 of 2: " in ended[0].err) == (rank == 1)
    assert ended[1].err == ""
    assert not list(out.rglob(".tmp-*"))
    if (out / ".m27quant" / "journal.jsonl").exists():
        resumes(program, case, out, 3, expected)


@pytest.mark.parametrize("point", ["tensor-written:30", "layer-computed:2"])
def test_the_others_death_at_a_point(
    point: str, program: Program, case: Case, out: Path, expected: dict[str, str]
) -> None:
    ended = together(program, case.argv(out), 2, only={1: {"env": {"M27QUANT_FAULT": point}}})
    assert [e.code for e in ended] == [4, KILLED]
    resumes(program, case, out, 1, expected)


def test_other_inputs_on_one_rank_are_refused(program: Program, case: Case, out: Path) -> None:
    """Another node with another version: nothing is begun with it."""
    other = {1: {"setup": [("set_attribute", "torch.__version__", "9.9.9")]}}
    ended = together(program, case.argv(out), 2, only=other)
    assert [e.code for e in ended] == [2, 2], [e.err for e in ended]
    assert "rank 1 of 2: " in ended[0].err
    assert "torch: " in ended[0].err
    assert not out.exists()


def test_what_is_wrong_before_the_work_is_said_once(program: Program, case: Case, out: Path) -> None:
    argv = ("quantize", str(case.model.parent / "nowhere"), str(out), "--dataset", str(case.rows))
    ended = together(program, argv, 2)
    assert ended[0].code == ended[1].code != 0
    assert "nowhere" in ended[0].err
    assert ended[1].err == ""


def kill_one_at_random(
    program: Program, case: Case, out: Path, expected: dict[str, str], *, kills: int, seed: int
) -> None:
    """Runs that continue each other, of one to four ranks, each losing one of its ranks at a random time."""
    chance = random.Random(seed)
    seconds = 1.5
    while kills:
        size = chance.randint(1, 4)
        ranks = launch(program, case.argv(out, "--resume"), size)
        time.sleep(chance.uniform(0.02, seconds))
        victim = chance.randrange(size)
        ranks[victim].send(signal.SIGKILL)
        ended = [rank.wait() for rank in ranks]
        if ended[victim].code == 0:
            assert [e.code for e in ended] == [0] * size, [e.err for e in ended]
            assert tree(out) == expected
            shutil.rmtree(out)
            seconds *= 0.7
            continue
        kills -= 1
        assert ended[victim].code == -signal.SIGKILL
        for rank, end in enumerate(ended):
            assert "Traceback" not in end.err, end.err
            assert rank == victim or end.code in (0, 4), end.err
        if passes_for_a_checkpoint(out):
            assert visible(out) == {n: d for n, d in expected.items() if not n.startswith(".m27quant/")}
    resumes(program, case, out, chance.randint(1, 4), expected)


def test_killed_at_random_times(program: Program, case: Case, out: Path, expected: dict[str, str]) -> None:
    """RANK_KILLS and RANK_SEED make it longer, and another."""
    kills, seed = int(os.environ.get("RANK_KILLS", "4")), int(os.environ.get("RANK_SEED", "1"))
    kill_one_at_random(program, case, out, expected, kills=kills, seed=seed)
