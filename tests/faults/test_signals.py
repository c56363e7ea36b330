"""Signals, several runs on one OUT, and kill -9 at any time."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Case
from tests.faults.harness import (
    Finished,
    Process,
    Program,
    passes_for_a_checkpoint,
    tree,
    units_done,
    until,
    visible,
)

SLOW = ("slowly", 0.05)


def resume_line(err: str) -> list[str]:
    """The arguments of the command that the hint names."""
    (line,) = (x for x in err.splitlines() if "continue with: " in x)
    program, *argv = shlex.split(line.partition("continue with: ")[2])
    assert program == "m27quant"
    return argv


def start_slowly(program: Program, case: Case, out: Path, *options: str, units: int = 2) -> Process:
    """A run in the middle of its work."""
    process = program.start(*case.argv(out, *options), setup=[SLOW])
    until(lambda: units_done(out) >= units)
    return process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_run_where_it_can_go_on(
    signum: signal.Signals, program: Program, case: Case, out: Path
) -> None:
    process = start_slowly(program, case, out)
    process.send(signum)
    ended = process.wait()
    assert ended.code == 128 + signum
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert f"stopped by {signum.name}" in ended.err
    assert visible(out) == {}
    assert units_done(out) >= 2
    argv = resume_line(ended.err)
    assert argv.count("--resume") == 1
    ended = program.run(*argv)
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


def test_the_resume_command_is_the_users_own(program: Program, case: Case, out: Path) -> None:
    """Spaces are quoted, secrets and --overwrite left out, arguments behind -- stay behind it."""
    spaced = out / "with space" / "'quoted'"
    options = ["--token", "hf_secret", "--overwrite", "--dataset", str(case.rows), "--no-progress"]
    process = program.start("quantize", *options, "--", case.model, spaced, setup=[SLOW])
    until(lambda: units_done(spaced) >= 1)
    process.send(signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130
    assert "hf_secret" not in ended.err
    argv = resume_line(ended.err)
    assert "--overwrite" not in argv
    ended = program.run(*argv)
    assert (ended.code, tree(spaced)) == (0, case.undisturbed), ended.err


def test_stopped_before_anything_is_done(program: Program, case: Case, out: Path) -> None:
    process = program.start(
        *case.argv(out), setup=[SLOW, ("set_attribute", "m27quant.copy_job.PIECE_BYTES", 100)]
    )
    until(lambda: (out / ".m27quant").exists())
    process.send(signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130
    ended = program.run(*resume_line(ended.err))
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


def test_the_second_signal_stops_at_once(program: Program, case: Case, out: Path) -> None:
    process = program.start(*case.argv(out), setup=[SLOW, ("deaf",)])
    until(lambda: units_done(out) >= 1)
    process.send(signal.SIGINT)
    time.sleep(0.2)
    process.send(signal.SIGINT)
    sent = time.monotonic()
    ended = process.wait()
    assert time.monotonic() - sent < 1
    assert (ended.code, ended.out) == (130, "")
    assert "once more to stop at once" in ended.err
    assert "Traceback" not in ended.err
    ended = program.run(*case.argv(out, "--resume"))
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


# -- several runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [(), ("--resume",), ("--overwrite",), ("--overwrite", "--force-unlock")], ids=str
)
def test_the_second_run_on_one_out_is_sent_away(
    flags: tuple[str, ...], program: Program, case: Case, out: Path
) -> None:
    process = start_slowly(program, case, out, units=1)
    started = time.monotonic()
    second = program.run(*case.argv(out, *flags))
    assert time.monotonic() - started < 5
    assert second.code == 5
    assert f"process {process.pid} on {socket.gethostname()}" in second.err
    assert "hint: wait for it, or stop it first" in second.err
    ended = process.wait()
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


def test_a_lock_dies_with_its_process(program: Program, case: Case, out: Path) -> None:
    process = start_slowly(program, case, out)
    assert process.kill().code == -signal.SIGKILL
    assert (out / ".m27quant" / "owner.json").exists()
    ended = program.run(*case.argv(out, "--resume"))
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


def test_a_run_on_another_machine_is_shown_before_it_is_overruled(
    program: Program, case: Case, out: Path
) -> None:
    process = start_slowly(program, case, out)
    process.kill()
    owner = out / ".m27quant" / "owner.json"
    owner.write_text(json.dumps({"pid": 77, "host": "elsewhere\x1b[2J"}))
    before = tree(out)
    for flag in ("--resume", "--overwrite"):
        refused = program.run(*case.argv(out, flag))
        assert refused.code == 5
        assert "process 77 on elsewhere\\x1b[2J" in refused.err
        assert "--force-unlock" in refused.err
    after = tree(out)
    assert before == {n: d for n, d in after.items() if not n.endswith("/lock")} | {
        n: d for n, d in before.items() if n.endswith("/lock")
    }
    ended = program.run(*case.argv(out, "--resume", "--force-unlock"))
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


@pytest.mark.parametrize("record", ["", "[]", "{", '{"pid": {}, "host": 7}', "\x00" * 100])
def test_an_owner_that_cannot_be_read_is_no_owner(
    record: str, program: Program, case: Case, out: Path
) -> None:
    start_slowly(program, case, out, units=1).kill()
    (out / ".m27quant" / "owner.json").write_text(record)
    flags = ("--resume", "--force-unlock") if "host" in record else ("--resume",)
    ended = program.run(*case.argv(out, *flags))
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


def test_many_at_once(program: Program, case: Case, out: Path) -> None:
    """Of six runs that begin together one wins; the others are sent away, and what comes out is whole."""
    processes = [program.start(*case.argv(out)) for _ in range(6)]
    ended = [p.wait() for p in processes]
    assert sorted(e.code for e in ended)[0] == 0
    assert {e.code for e in ended} <= {0, 2, 4, 5}, [e.err for e in ended]
    assert [e.code for e in ended].count(0) == 1
    assert tree(out) == case.undisturbed


# -- kill -9 at random times -----------------------------------------------------------------------


def kill_at_random(
    program: Program, argv: tuple[str, ...], out: Path, seconds: float, kills: int, seed: int
) -> Finished:
    """Kill runs that continue each other until `kills` were killed; what has come through begins anew."""
    chance = random.Random(seed)
    whole: dict[str, str] | None = None
    while kills:
        process = program.start(*argv, "--resume")
        time.sleep(chance.uniform(0.02, seconds))
        ended = process.kill()
        if ended.code == 0:  # it was faster
            whole = whole or tree(out)
            assert tree(out) == whole
            shutil.rmtree(out)
            continue
        assert ended.code == -signal.SIGKILL
        kills -= 1
        if passes_for_a_checkpoint(out):
            assert whole is None or visible(out) == {n: d for n, d in whole.items() if n in visible(out)}
    return program.run(*argv, "--resume")


def test_killed_at_random_times(program: Program, case: Case, out: Path) -> None:
    started = time.monotonic()
    assert program.run(*case.argv(out)).code == 0
    seconds = time.monotonic() - started
    shutil.rmtree(out)
    ended = kill_at_random(program, case.argv(out), out, seconds, kills=20, seed=1)
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


@pytest.mark.slow
def test_tiny_m27_killed_at_random_times(repository: Path, program: Program, out: Path) -> None:
    """The embedded checkpoint, text rows through its own tokenizer: 20 kills, the same bytes."""
    tiny = repository / "examples" / "tiny-m27"
    argv = (
        "quantize", str(tiny), str(out), "--dataset", str(tiny / "calibration.jsonl"),
        "--num-samples", "8", "--seq-len", "64", "--no-progress",
    )  # fmt: skip
    started = time.monotonic()
    assert program.run(*argv).code == 0
    seconds = time.monotonic() - started
    undisturbed = tree(out)
    shutil.rmtree(out)
    ended = kill_at_random(program, argv, out, seconds * 0.6, kills=20, seed=2)
    assert (ended.code, tree(out)) == (0, undisturbed), ended.err


def test_nothing_but_the_log_is_left(case: Case) -> None:
    """What the other tests compare with: a finished run leaves no private file but its log."""
    assert [n for n in case.undisturbed if n.startswith(".m27quant/")] == []
    assert os.sep == "/"
