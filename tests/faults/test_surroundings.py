"""Where and as whom the program runs: modes, users, homes, folders of any name, readers that leave."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Case
from tests.faults.harness import KILLED, Program, tree, visible

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


@pytest.fixture
def theirs(out: Path) -> Path:
    """A folder that another user may write to."""
    for parent in (out.parent, out.parent.parent):
        parent.chmod(0o755)
    out.mkdir()
    out.chmod(0o777)
    return out


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_modes_follow_the_umask(umask: int, mode: int, program: Program, case: Case, out: Path) -> None:
    assert program.run(*case.argv(out), umask=umask).code == 0
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.rglob("*") if p.is_file()} == {mode}
    folders = {stat.S_IMODE(p.stat().st_mode) for p in (out, *out.rglob("*")) if p.is_dir()}
    assert folders == {0o777 & ~umask}


def test_modes_after_a_crash(program: Program, case: Case, out: Path) -> None:
    for point in ("layer-computed:1", "commit-shard:2"):
        assert program.run(*case.argv(out, "--resume"), env={"M27QUANT_FAULT": point}).code == KILLED
    assert program.run(*case.argv(out, "--resume")).code == 0
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.rglob("*") if p.is_file()} == {0o644}


@as_root
def test_a_model_that_is_read_only(program: Program, case: Case, theirs: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(case.model, theirs / "elsewhere"))
    model = model.rename(theirs.parent / "model")
    for path in model.iterdir():
        path.chmod(0o444)
    model.chmod(0o555)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in model.iterdir())
    argv = ("quantize", model, theirs / "out", "--dataset", case.rows, "-q")
    ended = program.run(*argv, setup=[("as_user", NOBODY)])
    assert (ended.code, tree(theirs / "out")) == (0, case.undisturbed), ended.err
    assert sorted((p.name, p.stat().st_mtime_ns) for p in model.iterdir()) == before


@as_root
@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00005.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json"],
)
def test_files_that_may_not_be_read(name: str, program: Program, case: Case, theirs: Path) -> None:
    model = theirs.parent / "model"
    shutil.copytree(case.model, model)
    (model / "tokenizer.json").write_text("{}")
    (model / "tokenizer.json").chmod(0o644)
    (model / name).chmod(0o600)
    argv = ("quantize", model, theirs / "out", "--dataset", case.rows, "-q")
    ended = program.run(*argv, setup=[("as_user", NOBODY)])
    assert ended.code == 4, ended.err
    assert f"{name}: permission denied (mode " in ended.err
    assert "0600" in ended.err or "-rw-------" in ended.err
    assert "hint: chmod u+r" in ended.err
    assert not (theirs / "out").exists()


@as_root
def test_folders_that_may_not_be_entered(program: Program, case: Case, theirs: Path) -> None:
    model = theirs.parent / "model"
    shutil.copytree(case.model, model)
    model.chmod(0o700)
    for argv in (
        ("quantize", model, theirs / "out", "--dataset", case.rows),
        ("quantize", model / "below", theirs / "out", "--dataset", case.rows),
        ("quantize", case.model, theirs / "out", "--dataset", model / "rows.jsonl"),
        ("quantize", case.model, model / "out", "--dataset", case.rows),
    ):
        ended = program.run(*argv, setup=[("as_user", NOBODY)])
        assert ended.code == 4, (argv, ended.err)
        assert "\nhint: " in ended.err
        assert not (theirs / "out").exists()


@as_root
@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_data_that_may_not_be_read(suffix: str, program: Program, case: Case, theirs: Path) -> None:
    rows = (theirs / "rows").with_suffix(suffix)
    shutil.copy(case.rows, rows)
    rows.chmod(0o600)
    argv = ("quantize", case.model, theirs / "out", "--dataset", rows)
    ended = program.run(*argv, setup=[("as_user", NOBODY)])
    assert ended.code == 4, ended.err
    assert rows.name in ended.err
    assert "\nhint: " in ended.err
    assert not (theirs / "out").exists()


@as_root
def test_out_that_may_not_be_written(program: Program, case: Case, theirs: Path) -> None:
    theirs.chmod(0o755)
    for target in (theirs, theirs / "out"):
        ended = program.run(*case.argv(target), setup=[("as_user", NOBODY)])
        assert ended.code == 4, ended.err
        assert f"{theirs}: not writable" in ended.err
        assert list(theirs.iterdir()) == []


@as_root
def test_a_run_of_another_user(program: Program, case: Case, theirs: Path) -> None:
    """Begun as root, resumed as somebody who may not write there."""
    assert program.run(*case.argv(theirs), env={"M27QUANT_FAULT": "layer-computed:2"}).code == KILLED
    for flag in ("--resume", "--overwrite"):
        ended = program.run(*case.argv(theirs, flag), setup=[("as_user", NOBODY)])
        assert ended.code == 4, ended.err
        assert "\nhint: " in ended.err
    ended = program.run(*case.argv(theirs, "--resume"))
    assert (ended.code, tree(theirs)) == (0, case.undisturbed), ended.err


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "ünïcödé-模型",
        "-dash",
        "[bold]x[/]",
        "new\nline",
        "d" * 200 + "/" + "e" * 200,
        ".",
        "\udcff",
    ],
    ids=ascii,
)
def test_out_of_any_name(name: str, program: Program, case: Case, out: Path) -> None:
    out.mkdir()
    ended = program.run("quantize", "--dataset", case.rows, "--", case.model, name, cwd=out)
    assert (ended.code, tree(out / name)) == (0, case.undisturbed), ended.err
    fault = {"M27QUANT_FAULT": "layer-computed:2"}
    argv = ("quantize", "--dataset", case.rows, "--overwrite", "--", case.model, name)
    assert program.run(*argv, cwd=out, env=fault).code == KILLED
    argv = ("quantize", "--dataset", case.rows, "--resume", "--", case.model, name)
    ended = program.run(*argv, cwd=out)
    assert (ended.code, tree(out / name)) == (0, case.undisturbed), ended.err


@pytest.mark.parametrize(
    "name",
    ["# [x](javascript:1)", "---\nlicense: mit\n---", "\x1b[2J", "\udcff", "`$(id)`", "a" * 255],
    ids=ascii,
)
def test_a_model_and_data_of_any_name(
    name: str, program: Program, case: Case, out: Path, tmp_path: Path
) -> None:
    """Their names reach the report and the model card: as data, on one line."""
    model = Path(shutil.copytree(case.model, tmp_path / name))
    shown = name[:240] if name.isascii() else "rows"
    rows = Path(shutil.copy(case.rows, tmp_path / f"{shown}.jsonl"))
    ended = program.run("quantize", model, out, "--dataset", rows)
    assert ended.code == 0, ended.err
    report = json.loads((out / "quantization_report.json").read_bytes())
    assert report["source"]["name"] == name
    assert report["calibration"]["datasets"] == [rows.name]
    card = (out / "README.md").read_text()
    assert [line for line in card.splitlines() if line.startswith("license")] == []
    assert not {c for c in card if not c.isprintable()} - {"\n"}
    assert "](javascript" not in card
    assert visible(out).keys() == case.undisturbed.keys()


def test_data_whose_name_is_not_utf8(program: Program, case: Case, out: Path, tmp_path: Path) -> None:
    rows = shutil.copy(case.rows, tmp_path / "\udcff.jsonl")
    ended = program.run("quantize", case.model, out, "--dataset", rows)
    assert ended.code == 2
    assert "\\udcff.jsonl: the name is not UTF-8\n\nhint: rename the file" in ended.err
    assert not out.exists()


@pytest.mark.parametrize("home", ["/nonexistent", "/proc", None])
def test_no_home(home: str | None, program: Program, case: Case, theirs: Path) -> None:
    setup = [("as_user", NOBODY)] if os.geteuid() == 0 else []
    env = {"HOME": home, "HF_HOME": None, "XDG_CACHE_HOME": None, "TMPDIR": None}
    ended = program.run(*case.argv(theirs / "out"), env=env, setup=setup)
    assert (ended.code, tree(theirs / "out")) == (0, case.undisturbed), ended.err


def test_no_home_from_the_start(case: Case, out: Path) -> None:
    """A fresh process, since libraries look for their homes when they are imported."""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HOME", "XDG_CACHE_HOME")}
    ended = subprocess.run(
        [sys.executable, "-m", "m27quant", *case.argv(out)],
        env=env | {"HOME": "/proc/none", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, tree(out)) == (0, case.undisturbed), ended.stderr


@pytest.mark.parametrize("mode", [[], ["--json"], ["-q"]], ids=str)
def test_a_reader_that_leaves_costs_no_work(mode: list[str], program: Program, case: Case, out: Path) -> None:
    """`m27quant quantize ... | head -0`: the checkpoint is whole before its summary is printed."""
    ended = program.run(*case.argv(out, *mode), setup=[("nobody_reads", 1)])
    assert ended.code == 141
    assert "Traceback" not in ended.err
    assert tree(out) == case.undisturbed


def test_a_terminal_that_went_away_costs_no_work(program: Program, case: Case, out: Path) -> None:
    """stderr is closed by its reader: nothing can be said any more, the work goes on."""
    ended = program.run(*case.argv(out), setup=[("nobody_reads", 2)])
    assert (ended.code, tree(out)) == (0, case.undisturbed)
    assert ended.out.startswith("done")


def test_few_open_files(program: Program, case: Case, out: Path) -> None:
    limit = [("limit", "RLIMIT_NOFILE", 16)]
    ended = program.run(*case.argv(out, "--max-shard-size", "1kB"), setup=limit)
    assert ended.code == 4, ended.err
    assert "Too many open files" in ended.err
    assert "hint: " in ended.err
