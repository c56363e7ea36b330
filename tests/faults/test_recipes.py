"""Recipes that search for better scales: killed anywhere, on one process or several, the bytes are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import Case
from tests.faults.harness import (
    KILLED,
    PATIENCE,
    SMALL_CHUNKS,
    Program,
    Tree,
    launch,
    together,
    tree,
    visible,
)


def argv(case: Case, out: Path, method: str, *options: str) -> tuple[str, ...]:
    return case.argv(out, "--recipe", f"nvfp4_experts_only_{method}-fp8_kv", *options)


@pytest.fixture(scope="module", params=["mse", "awmse", "gptq"])
def method(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def expected(method: str, program: Program, case: Case, fast_folder: Path) -> Tree:
    """What one process makes that nobody disturbs."""
    out = fast_folder / method
    ended = program.run(*argv(case, out, method), setup=[SMALL_CHUNKS])
    assert ended.code == 0, ended.err
    return tree(out)


def test_killed_and_resumed(method: str, program: Program, case: Case, out: Path, expected: Tree) -> None:
    """With sums in a file, with the first layer packed but not recorded, with the second one."""
    points = [*(["hessians-spilled:1"] if method == "gptq" else []), "layer-computed:1", "layer-computed:2"]
    options: tuple[str, ...] = ()
    for point in points:
        env = {"M27QUANT_FAULT": point}
        ended = program.run(*argv(case, out, method, *options), env=env, setup=[SMALL_CHUNKS])
        assert ended.code == KILLED, ended.err
        assert visible(out) == {}
        options = ("--resume",)
    ended = program.run(*argv(case, out, method, "--resume"), setup=[SMALL_CHUNKS])
    assert (ended.code, tree(out)) == (0, expected), ended.err


def test_two_ranks_begin_and_three_end(
    method: str, program: Program, case: Case, out: Path, expected: Tree
) -> None:
    point = "hessians-spilled:2" if method == "gptq" else "layer-computed:2"
    dies = {1: {"env": {"M27QUANT_FAULT": point}}}
    ranks = launch(program, argv(case, out, method), 2, only=dies)
    assert [rank.wait().code for rank in ranks] == [4, KILLED]
    assert visible(out) == {}
    ended = together(program, argv(case, out, method, "--resume"), 3)
    assert [e.code for e in ended] == [0] * 3, [e.err for e in ended]
    assert tree(out) == expected


def test_a_full_disk_under_the_sums_is_said(program: Program, case: Case, out: Path) -> None:
    env = {"M27QUANT_FAULT": "hessians-spilled:1:enospc"}
    ended = program.run(*argv(case, out, "gptq"), env=env, setup=[SMALL_CHUNKS, PATIENCE])
    assert ended.code == 4
    assert "no space left" in ended.err
    assert "--resume" in ended.err
