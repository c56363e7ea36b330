"""--overwrite: the older checkpoint stays whole until the commit begins, and nothing of anybody else's goes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from m27quant.errors import OutputError
from m27quant.progress import Progress
from m27quant.quantize import quantize_checkpoint
from tests.checkpoints import write_checkpoint
from tests.faults.conftest import SMALL, Case, Ended, Quantize
from tests.faults.harness import KILLED, Program, Tree, passes_for_a_checkpoint, tree, visible


@pytest.fixture(scope="module")
def older(program: Program, case: Case, fast_folder: Path) -> Iterator[Path]:
    """A finished checkpoint of another model, with files that the new one has and files that it has not."""
    model = write_checkpoint(fast_folder / "older-model", SMALL, seed=1)
    (model / "tokenizer.json").write_text("{}")
    out = fast_folder / "older"
    argv = ["quantize", str(model), str(out), "--dataset", str(case.rows), "--max-shard-size", "8kB", "-q"]
    ended = program.run(*argv)
    assert ended.code == 0, ended.err
    assert len(list(out.glob("*.safetensors"))) > 4
    yield out
    shutil.rmtree(model)
    shutil.rmtree(out)


def commit_points(case: Case) -> list[tuple[str, int]]:
    """(point, passing) of every fault point from the commit's journal line on."""
    first = case.passed.index("commit-begin") - 3  # journal-before, -torn and -after of that line
    return [(p, case.passed[: i + 1].count(p)) for i, p in enumerate(case.passed) if i >= first]


def check_state(out: Path, older: Tree, newer: Tree, where: object) -> None:
    """What passes for a checkpoint is one of the two, whole."""
    found = visible(out)
    if passes_for_a_checkpoint(out):
        assert found in (older, newer), where


@pytest.mark.parametrize("again", ["--resume", "--overwrite"])
def test_killed_at_every_point_of_the_commit(
    again: str, program: Program, case: Case, older: Path, out: Path
) -> None:
    before, after = visible(older), visible_of(case.undisturbed)
    points = commit_points(case)
    assert len(points) > 25
    for point, number in points if again == "--resume" else points[::2]:
        shutil.copytree(older, out)
        fault = {"M27QUANT_FAULT": f"{point}:{number}"}
        assert program.run(*case.argv(out, "--overwrite"), env=fault).code == KILLED
        check_state(out, before, after, (point, number))
        if number == 1 and point != "clean-up-leftovers":
            refused = program.run(*case.argv(out))
            assert refused.code == 2
            assert "--resume" in refused.err
            assert "--overwrite" in refused.err
        ended = program.run(*case.argv(out, again))
        assert ended.code == 0, (point, number, ended.err)
        assert tree(out) == case.undisturbed, (point, number)
        shutil.rmtree(out)


def visible_of(files: Tree) -> Tree:
    return {name: digest for name, digest in files.items() if not name.startswith(".m27quant/")}


def test_killed_before_the_commit(program: Program, case: Case, older: Path, out: Path) -> None:
    before = visible(older)
    steps = len(case.passed) - len(commit_points(case))
    for at in range(0, steps, 23):
        point = case.passed[at]
        number = case.passed[: at + 1].count(point)
        shutil.copytree(older, out)
        fault = {"M27QUANT_FAULT": f"{point}:{number}"}
        assert program.run(*case.argv(out, "--overwrite"), env=fault).code == KILLED
        assert visible(out) == before
        ended = program.run(*case.argv(out, "--resume"))
        assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err
        shutil.rmtree(out)


def test_other_sizes_after_a_commit_that_was_killed(
    program: Program, case: Case, older: Path, out: Path
) -> None:
    """Three layouts one over the other: of the first two nothing is left, though neither was ever finished."""
    for point, number in commit_points(case)[::4]:
        shutil.copytree(older, out)
        fault = {"M27QUANT_FAULT": f"{point}:{number}"}
        half = ("--overwrite", "--max-shard-size", "20kB")
        assert program.run(*case.argv(out, *half), env=fault).code == KILLED
        ended = program.run(*case.argv(out, "--overwrite"))
        assert (ended.code, tree(out)) == (0, case.undisturbed), (point, number, ended.err)
        shutil.rmtree(out)


def test_killed_while_an_unfinished_commit_is_undone(
    program: Program, case: Case, older: Path, out: Path
) -> None:
    for number in (1, 3, 4):
        shutil.copytree(older, out)
        fault = {"M27QUANT_FAULT": f"commit-shard:{number}"}
        assert program.run(*case.argv(out, "--overwrite"), env=fault).code == KILLED
        fault = {"M27QUANT_FAULT": "journal-torn:1"}
        assert program.run(*case.argv(out, "--overwrite"), env=fault).code == KILLED
        assert not passes_for_a_checkpoint(out)
        ended = program.run(*case.argv(out, "--overwrite"))
        assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err
        shutil.rmtree(out)


def test_a_run_that_fails_leaves_the_older_checkpoint(
    model: Path, older: Path, out: Path, quantize: Quantize
) -> None:
    shutil.copytree(older, out)
    before = tree(out)
    (model / "config.json").unlink()
    assert quantize(model, out, "--overwrite").code == 3
    assert tree(out) == before
    assert quantize(model, out).code == 2


# -- other people's files --------------------------------------------------------------------------

THEIRS = (
    "notes.txt",
    ".tmp-precious",
    ".tmp-1-config.json",
    "model.bin",
    "sub/config.json",
    ".hidden",
    "x.safetensors",
)


def add_theirs(out: Path) -> None:
    for name in THEIRS:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")


def theirs_are_whole(out: Path) -> bool:
    return all((out / name).read_text() == f"mine: {name}" for name in THEIRS)


def test_files_beside_ours_stay(program: Program, case: Case, older: Path, out: Path) -> None:
    shutil.copytree(older, out)
    add_theirs(out)
    ended = program.run(*case.argv(out, "--overwrite"))
    assert ended.code == 0, ended.err
    assert theirs_are_whole(out)
    assert {n: d for n, d in tree(out).items() if n not in THEIRS} == case.undisturbed


def test_files_that_come_during_the_work_stay(program: Program, case: Case, out: Path) -> None:
    assert program.run(*case.argv(out), env={"M27QUANT_FAULT": "layer-computed:2"}).code == KILLED
    add_theirs(out)
    assert program.run(*case.argv(out, "--resume"), env={"M27QUANT_FAULT": "commit-shard:2"}).code == KILLED
    assert theirs_are_whole(out)
    assert program.run(*case.argv(out, "--overwrite")).code == 0
    assert theirs_are_whole(out)


@pytest.mark.parametrize("name", ["config.json", "README.md", "model-00001-of-00004.safetensors"])
def test_files_with_our_names_that_are_not_ours(name: str, case: Case, out: Path, quantize: Quantize) -> None:
    """A private folder alone does not make a foreign config.json ours."""
    (out / ".m27quant").mkdir(parents=True)
    (out / name).write_text("theirs")
    for flag in ("--overwrite", "--resume"):
        ended = quantize(case.model, out, flag)
        assert (ended.code, ended.error["kind"]) == (5, "output")
        assert name in ended.error["message"]
        assert ended.error["hint"]
        assert tree(out) == tree_of(out, name, "theirs")


def tree_of(out: Path, name: str, text: str) -> Tree:
    assert (out / name).read_text() == text
    return {name: tree(out)[name]}


def test_a_file_with_our_name_that_comes_late(program: Program, case: Case, out: Path) -> None:
    """Put there during the work: the commit does not begin, the work is kept."""
    assert program.run(*case.argv(out), env={"M27QUANT_FAULT": "layer-computed:2"}).code == KILLED
    (out / "config.json").write_text("theirs")
    ended = program.run(*case.argv(out, "--resume"))
    assert ended.code == 5
    assert "config.json" in ended.err
    assert (out / "config.json").read_text() == "theirs"
    (out / "config.json").rename(out.parent / "elsewhere")
    ended = program.run(*case.argv(out, "--resume"))
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


def test_a_file_with_our_name_that_comes_while_the_run_works(case: Case, out: Path) -> None:
    """Looked for at the beginning, and again before the commit."""

    def listen(snapshot: Progress) -> None:
        if snapshot.stage == "experts" and snapshot.layer == 1:
            (out / "config.json").write_text("theirs")

    with pytest.raises(OutputError, match=r"did not make and would replace: config\.json"):
        quantize_checkpoint(str(case.model), out, dataset=str(case.rows), progress=listen)
    assert visible(out) == {"config.json": tree(out)["config.json"]}
    assert (out / "config.json").read_text() == "theirs"
    (out / "config.json").unlink()
    quantize_checkpoint(str(case.model), out, dataset=str(case.rows), resume=True)
    assert tree(out) == case.undisturbed


def test_what_has_landed_is_not_taken_down_again(program: Program, case: Case, out: Path) -> None:
    """Killed when only the cleaning up was left: whole it is, and whole it stays."""
    whole = visible_of(case.undisturbed)
    for again in ("--resume", "--overwrite"):
        assert program.run(*case.argv(out), env={"M27QUANT_FAULT": "clean-up:1"}).code == KILLED
        assert visible(out) == whole
        fault = {"M27QUANT_FAULT": "clean-up:1" if again == "--resume" else "layer-computed:2"}
        assert program.run(*case.argv(out, again), env=fault).code == KILLED
        assert visible(out) == whole
        never = {"M27QUANT_FAULT": "commit-begin:1" if again == "--resume" else "none"}
        ended = program.run(*case.argv(out, "--resume"), env=never)
        assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err
        shutil.rmtree(out)


@pytest.mark.parametrize(
    "files",
    [["..", "../outside", "."], ["/etc/hosts", "sub/x"], [7, None, {}, ""], "all", ["\x00", "n" * 300], [".m27quant"]],
    ids=str,
)  # fmt: skip
def test_a_report_that_lists_what_is_not_ours(
    files: object, case: Case, older: Path, out: Path, quantize: Quantize
) -> None:
    from tests.faults.corruptions import edit_json

    shutil.copytree(older, out)
    (out.parent / "outside").write_text("theirs")
    (out / "sub").mkdir()
    (out / "sub" / "x").write_text("theirs")
    edit_json(out / "quantization_report.json", lambda report: report.update(files=files))
    ended: Ended = quantize(case.model, out, "--overwrite")
    assert ended.code == 5, "what the report does not list is not ours"
    assert (out.parent / "outside").read_text() == (out / "sub" / "x").read_text() == "theirs"
    assert Path("/etc/hosts").exists()
