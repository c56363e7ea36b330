"""Kill -9 anywhere: what is left never passes for a checkpoint, and --resume ends with the undisturbed bytes."""

from __future__ import annotations

import collections
import random
import shutil
from pathlib import Path

import pytest

from tests.faults.conftest import Case
from tests.faults.harness import KILLED, Program, passes_for_a_checkpoint, tree, visible

POINTS = {
    "file-reserved", "file-written", "file-renamed", "tensor-written", "layer-computed", "journal-before",
    "journal-torn", "journal-after", "commit-begin", "commit-unlinked", "commit-shard", "commit-document", "clean-up",
    "clean-up-leftovers",
}  # fmt: skip
SAMPLED = {"tensor-written": 12}
"""Of these points so many passings are tried; of all others every one."""


def passings(case: Case, point: str) -> list[int]:
    """Which passings of a point to try: 1 is the first."""
    count = collections.Counter(case.passed)[point]
    if point not in SAMPLED:
        return list(range(1, count + 1))
    inner = random.Random(point).sample(range(2, count), SAMPLED[point] - 2)
    return [1, *sorted(inner), count]


def check_resumed(program: Program, case: Case, out: Path, *options: str) -> None:
    """`--resume` ends well, with the undisturbed files and no other."""
    ended = program.run(*case.argv(out, "--resume", *options))
    assert ended.code == 0, ended.err
    assert tree(out) == case.undisturbed


def test_every_point_is_passed(case: Case) -> None:
    assert set(case.passed) == POINTS


@pytest.mark.parametrize("point", sorted(POINTS))
def test_killed_at_every_point(point: str, program: Program, case: Case, out: Path) -> None:
    assert passings(case, point)
    for number in passings(case, point):
        ended = program.run(*case.argv(out), env={"M27QUANT_FAULT": f"{point}:{number}"})
        assert ended.code == KILLED, (number, ended.err)
        if passes_for_a_checkpoint(out):
            assert visible(out) == visible_of(case.undisturbed), number
        check_resumed(program, case, out)
        shutil.rmtree(out)


def visible_of(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if not name.startswith(".m27quant/")}


def test_killed_again_and_again(program: Program, case: Case, out: Path) -> None:
    """Resumed runs are killed too, in every stage, until one comes through."""
    chance = random.Random(0)
    kills = 0
    for _ in range(16):
        while True:
            point = chance.choice(sorted(POINTS - {"tensor-written"}))
            ended = program.run(
                *case.argv(out, "--resume"), env={"M27QUANT_FAULT": f"{point}:{chance.randint(1, 3)}"}
            )
            if ended.code == 0:
                break
            assert ended.code == KILLED, ended.err
            kills += 1
            if passes_for_a_checkpoint(out):
                assert visible(out) == visible_of(case.undisturbed)
        assert tree(out) == case.undisturbed
        shutil.rmtree(out)
    assert kills >= 20


def test_the_next_run_may_have_the_same_process_id(program: Program, case: Case, out: Path) -> None:
    """As in a container, where it is always 1: temporary files of a killed run are in nobody's way."""
    same = [("with_process_id", 1)]
    for point, number in (("file-reserved", 1), ("file-written", 3), ("commit-unlinked", 1)):
        fault = {"M27QUANT_FAULT": f"{point}:{number}"}
        assert program.run(*case.argv(out), env=fault, setup=same).code == KILLED
        ended = program.run(*case.argv(out, "--resume"), setup=same)
        assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err
        shutil.rmtree(out)
    documents = case.passed.index("commit-begin") + 1
    number = case.passed[: documents + 3].count("file-reserved")  # the first small file of the commit
    fault = {"M27QUANT_FAULT": f"file-reserved:{number}"}
    assert program.run(*case.argv(out), env=fault, setup=same).code == KILLED
    ended = program.run(*case.argv(out, "--resume"), setup=same)
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err
