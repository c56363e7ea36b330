"""Drafters in training: killed anywhere, stopped by signals, on several ranks; the end is that of a quiet run."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from m27quant.drafters.tensor_file import read_tensors
from tests.drafters.conftest import TARGET, write_rows
from tests.faults.harness import KILLED, Process, Program, free_port, until, visible
from tests.tolerance import TRAINING_ATOL, TRAINING_RTOL

SIZES = (
    "--intermediate-size",
    "24",
    "--no-progress",
    "--steps",
    "6",
    "--save-every",
    "2",
    "--optimizer",
    "muon",
)
KINDS = {
    "dflash": ("--layers", "1", "--block-size", "4", "--anchors-per-seq", "4", "--taps", "1,3"),
    "eagle3": ("--draft-vocab-size", "40", "--num-steps", "2", "--taps", "1,3,5"),
}
MANY_STEPS = ("--steps", "2000")


class Case:
    """What is trained on, and what must come of it."""

    def __init__(self, program: Program, folder: Path) -> None:
        self.program = program
        self.target = _write_target(folder / "drafted")
        self.rows = write_rows(folder / "answers.jsonl", 9)
        (folder / "theirs").mkdir()
        (folder / "theirs" / "file").write_text("")
        assert program.ask({"warm": self.argv(folder / "theirs", "dflash")}) == {"code": 5}  # imports all
        self.undisturbed = folder / "trained"
        log = folder / "passed-in-training"
        env = {"M27QUANT_FAULT": "none", "M27QUANT_FAULT_LOG": str(log)}
        ended = program.run(*self.argv(self.undisturbed), env=env)
        assert ended.code == 0, ended.err
        self.passed = log.read_text().split()

    def argv(self, out: Path, kind: str = "dflash", *options: str) -> tuple[str, ...]:
        inputs = (
            "--target",
            str(self.target),
            "--data",
            str(self.rows),
            "--out",
            str(out),
            "--batch-size",
            "2",
        )
        return ("drafter", "train", kind, *inputs, *SIZES, *KINDS[kind], *options)

    def check(self, out: Path) -> None:
        """OUT is what the quiet run made."""
        same = ("model.safetensors", "config.json", "training.svg")
        found, expected = visible(out), visible(self.undisturbed)
        assert found.keys() == expected.keys()
        assert {name: found[name] for name in same} == {name: expected[name] for name in same}
        assert steps_of(out) == steps_of(self.undisturbed)
        assert not list(out.rglob(".tmp-*"))


def _write_target(folder: Path) -> Path:
    from tests.checkpoints import write_checkpoint

    return write_checkpoint(folder, TARGET)


def steps_of(out: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (out / ".m27quant" / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_s")
    return [{k: v for k, v in e.items() if k not in timed} for e in entries if e["event"] == "step"]


def num_steps(out: Path) -> int:
    log = out / ".m27quant" / "log.jsonl"
    return log.read_text().count('"event": "step"') if log.exists() else 0


@pytest.fixture(scope="module")
def training(program: Program, fast_folder: Path) -> Case:
    return Case(program, fast_folder)


POINTS = (
    "file-reserved:2", "file-written:5", "file-renamed:4", "journal-torn:2", "state-before:2", "state-after:1",
    "state-after:3", "finish-document:1", "finish-document:3", "finish-clean-up:1",
)  # fmt: skip


def test_every_fault_point_of_training_is_tried(training: Case) -> None:
    assert {point.split(":")[0] for point in POINTS} >= set(training.passed) - {
        "journal-before",
        "journal-after",
    }


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(point: str, training: Case, out: Path) -> None:
    ended = training.program.run(*training.argv(out), env={"M27QUANT_FAULT": point})
    assert ended.code == KILLED, ended.err
    if point != "finish-clean-up:1":
        assert not (out / "config.json").exists()
    ended = training.program.run(*training.argv(out, "dflash", "--resume"))
    assert ended.code == 0, ended.err
    training.check(out)


def test_kill_9_loses_the_running_step_at_most(training: Case, out: Path) -> None:
    """With a state after every step; then the next run begins at the step that was running."""
    options = ("--save-every", "1", *MANY_STEPS)
    process = training.program.start(*training.argv(out, "dflash", *options))
    until(lambda: num_steps(out) >= 5)
    assert process.kill().code == -signal.SIGKILL
    logged = num_steps(out)
    process = training.program.start(*training.argv(out, "dflash", *options, "--resume"))
    until(lambda: num_steps(out) > logged)
    process.send(signal.SIGTERM)
    said = process.wait().err
    begun = int(said.split("resumed behind step ")[1].split()[0])
    assert begun >= logged - 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_where_it_goes_on(signum: signal.Signals, training: Case, out: Path) -> None:
    process = training.program.start(*training.argv(out, "dflash", *MANY_STEPS))
    until(lambda: num_steps(out) >= 3)
    process.send(signum)
    ended = process.wait()
    assert ended.code == 128 + signum
    assert f"stopped by {signum.name}" in ended.err
    assert "continue with: m27quant drafter train dflash --target" in ended.err
    assert "--resume" in ended.err
    logged = num_steps(out)
    process = training.program.start(*training.argv(out, "dflash", *MANY_STEPS, "--resume"))
    until(lambda: num_steps(out) > logged)
    process.send(signum)
    assert f"resumed behind step {logged} of 2000" in process.wait().err


# -- ranks -----------------------------------------------------------------------------------------


def launch(training: Case, argv: tuple[str, ...], size: int) -> list[Process]:
    """As torchrun begins them."""
    port = str(free_port())
    return [
        training.program.start(
            *argv,
            env={
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
            },
        )
        for rank in range(size)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_two_ranks_are_one_with_twice_the_accumulation(kind: str, training: Case, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--dtype", "f32", "--optimizer", "adamw")
    alone = training.argv(one, kind, *options, "--grad-accumulation", "4")
    assert training.program.run(*alone).code == 0
    ended = [
        p.wait() for p in launch(training, training.argv(two, kind, *options, "--grad-accumulation", "2"), 2)
    ]
    assert [e.code for e in ended] == [0, 0], [e.err for e in ended]
    assert ended[1].err == ended[1].out == ""
    for a, b in zip(steps_of(one), steps_of(two), strict=True):
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], rel=TRAINING_RTOL)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=TRAINING_RTOL)
        assert a["accuracy"] == b["accuracy"]
    a, b = (read_tensors(folder / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].float() - b[name].float()).abs().max() <= TRAINING_ATOL, name


def test_ranks_stop_and_go_on_together(training: Case, out: Path) -> None:
    argv = training.argv(out, "dflash", "--steps", "12")
    ranks = launch(training, argv, 2)
    until(lambda: num_steps(out) >= 2)
    ranks[1].send(signal.SIGTERM)  # one of them alone
    ended = [rank.wait() for rank in ranks]
    assert [e.code for e in ended] == [143, 143], [e.err for e in ended]
    ended = [rank.wait() for rank in launch(training, (*argv, "--resume"), 2)]
    assert [e.code for e in ended] == [0, 0], [e.err for e in ended]
    quiet = out.with_name("quiet")
    assert [
        rank.wait().code for rank in launch(training, training.argv(quiet, "dflash", "--steps", "12"), 2)
    ] == [0, 0]
    assert steps_of(out) == steps_of(quiet)
    assert (out / "model.safetensors").read_bytes() == (quiet / "model.safetensors").read_bytes()


def test_a_rank_that_is_gone(training: Case, out: Path) -> None:
    ranks = launch(training, training.argv(out, "dflash", *MANY_STEPS), 2)
    until(lambda: num_steps(out) >= 2)
    ranks[1].kill()
    began = time.monotonic()
    ended = ranks[0].wait()
    assert ended.code == 4, ended.err
    assert "rank 0 of 2 cannot reach the others" in ended.err
    assert time.monotonic() - began < 60


def test_all_ranks_refuse_what_the_first_does(training: Case, out: Path) -> None:
    out.mkdir()
    (out / "own").write_text("")
    assert [p.wait().code for p in launch(training, training.argv(out), 2)] == [5, 5]
