"""Where OUT may not be: somebody's files, the model itself, a place that cannot be written to."""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path

import pytest

from m27quant.cli.app import main
from tests.faults.conftest import Quantize


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Every file below `folder` with its size and time of change."""
    return sorted(
        (str(p.relative_to(folder)), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")
    )


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)], ids=str)
def test_somebody_elses_files_are_left_alone(
    flags: tuple[str, ...], good: Path, tmp_path: Path, quantize: Quantize
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    (out / "config.json").write_text("{}")
    (out / "[bold]\x1b[2Jevil").touch()
    before = listing(out)
    ended = quantize(good, out, *flags)
    assert (ended.code, ended.error["kind"]) == (5, "output")
    assert "thesis.tex" in ended.error["message"]
    assert "\\x1b[2Jevil" in ended.error["message"]
    assert ended.error["hint"]
    assert listing(out) == before


def test_a_checkpoint_of_another_tool_is_somebody_elses(good: Path, model: Path, quantize: Quantize) -> None:
    before = listing(model)
    for flags in ((), ("--overwrite",)):
        assert quantize(good, model, *flags).code == 5
    assert listing(model) == before


@pytest.mark.parametrize(
    "report", ['{"producer": "m27quant"}', "[]", "{", '{"producer": {"name": ["m27quant"]}}']
)
def test_a_report_that_is_not_ours_makes_nothing_ours(
    report: str, good: Path, tmp_path: Path, quantize: Quantize
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "quantization_report.json").write_text(report)
    before = listing(out)
    assert quantize(good, out, "--overwrite").code == 5
    assert listing(out) == before


def test_a_file_is_no_folder(good: Path, tmp_path: Path, quantize: Quantize) -> None:
    (tmp_path / "file").write_text("precious")
    ended = quantize(good, tmp_path / "file")
    assert (ended.code, ended.error["message"]) == (5, f"{tmp_path}/file: exists and is not a folder")
    below = quantize(good, tmp_path / "file" / "out")
    assert below.code == 4
    assert "Not a directory" in below.error["message"]
    assert (tmp_path / "file").read_text() == "precious"


def test_out_is_not_model_by_whatever_name(
    model: Path, tmp_path: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alias").symlink_to(model)
    (tmp_path / "inside").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    before = listing(model)
    for out in (
        model,
        "model",
        "./model/../model/",
        "alias",
        model / "out",
        tmp_path / "alias" / "out",
        tmp_path / "inside" / "a" / "b",
        tmp_path,
        "/",
    ):
        for flags in ((), ("--overwrite",), ("--resume",)):
            ended = quantize(model, out, *flags)
            assert (ended.code, ended.error["kind"]) == (2, "usage"), out
            assert "OUT" in ended.error["message"]
            assert "MODEL" in ended.error["message"]
            assert ended.error["hint"]
    assert listing(model) == before


def test_out_that_holds_the_model_is_refused(model: Path, quantize: Quantize) -> None:
    ended = quantize(model, model.parent)
    assert (ended.code, "neither inside the other" in ended.error["message"]) == (2, True)


@pytest.mark.parametrize("flags", [("--resume", "--overwrite")])
def test_flags_that_exclude_each_other(
    flags: tuple[str, ...], good: Path, tmp_path: Path, quantize: Quantize
) -> None:
    ended = quantize(good, tmp_path / "out", *flags)
    assert (ended.code, ended.error["kind"]) == (2, "usage")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_stays_when_the_run_fails(model: Path, tmp_path: Path, quantize: Quantize) -> None:
    (model / "config.json").unlink()
    (tmp_path / "out").mkdir()
    assert quantize(model, tmp_path / "out").code == 3
    assert list((tmp_path / "out").iterdir()) == []


STATVFS = namedtuple("STATVFS", "f_bavail f_frsize f_files f_favail f_flag")


@pytest.mark.parametrize("made", [False, True])
def test_too_little_disk_is_said_before_the_work(
    made: bool, good: Path, tmp_path: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "below" / "out"
    if made:
        out.mkdir(parents=True)
    monkeypatch.setattr(os, "statvfs", lambda path: STATVFS(1000, 4096, 0, 0, 0))
    ended = quantize(good, out)
    assert (ended.code, ended.error["kind"]) == (4, "environment")
    assert "0.00 GiB free, 0.06 GiB needed" in ended.error["message"]
    assert ended.error["hint"]
    assert out.exists() == made
    assert (tmp_path / "deep").exists() == made
    if made:
        assert list(out.iterdir()) == []


def test_no_inodes_left(
    good: Path, tmp_path: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: STATVFS(2**40, 4096, 1000, 0, 0))
    ended = quantize(good, tmp_path / "out")
    assert (ended.code, "no inodes left" in ended.error["message"]) == (4, True)
    assert ended.error["hint"]
    assert not (tmp_path / "out").exists()


def test_a_read_only_file_system(
    good: Path, tmp_path: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: STATVFS(2**40, 4096, 1000, 1000, os.ST_RDONLY))
    ended = quantize(good, tmp_path / "out")
    assert (ended.code, f"{tmp_path}: not writable" in ended.error["message"]) == (4, True)
    assert not (tmp_path / "out").exists()


LONG = "n" * 300


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (LONG, 3), (f"/{LONG}", 3), ("~nosuchuser/model", 3), ("no-such-folder", 3), ("./gone", 3), ("", 3),
        ("org/na--me", 3), ("org/name.git", 3), ("a/b/c", 3), ("org/..", 3), ("/dev/null", 3), ("hf://nonsense", 3),
        ("org/name@\x1b[2J", 4), ("org/name", 4),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be(model: str, code: int, tmp_path: Path, quantize: Quantize) -> None:
    ended = quantize(model, tmp_path / "out")
    assert ended.code == code, ended.error
    assert ended.error["hint"]
    assert ended.error["message"].isprintable()
    assert not (tmp_path / "out").exists()


def test_names_of_out_that_cannot_be(good: Path, tmp_path: Path, quantize: Quantize) -> None:
    for out in (tmp_path / LONG, tmp_path / "/".join(["d" * 200] * 25)):
        ended = quantize(good, out)
        assert (ended.code, ended.error["kind"]) == (4, "environment")
        assert "File name too long" in ended.error["message"]
        assert ended.error["hint"]
    (tmp_path / "loop").symlink_to("loop")
    ended = quantize(good, tmp_path / "loop")
    assert ended.code in (4, 5)
    (tmp_path / "dangling").symlink_to("gone")
    assert quantize(good, tmp_path / "dangling").code in (4, 5)


def test_a_revision_is_for_the_hub(good: Path, tmp_path: Path, quantize: Quantize) -> None:
    ended = quantize(good, tmp_path / "out", "--revision", "main")
    assert (ended.code, "--revision" in ended.error["message"]) == (2, True)
    assert ended.error["hint"]


@pytest.mark.parametrize("dataset", ["~nosuchuser/rows.jsonl", LONG, f"/{LONG}.jsonl", "gone.jsonl", "a b"])
def test_calibration_data_that_cannot_be(
    dataset: str, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(good), str(tmp_path / "out"), "--dataset", dataset]) in (2, 4)
    said = capfd.readouterr().err
    assert said.startswith("error: ") or "\nerror: " in said
    assert "\nhint: " in said
    assert not (tmp_path / "out").exists()


def test_a_private_folder_that_is_a_link(good: Path, tmp_path: Path, quantize: Quantize) -> None:
    """What lies behind it is not ours to sweep."""
    (tmp_path / "theirs" / "work").mkdir(parents=True)
    (tmp_path / "theirs" / "work" / "thesis.tex").write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".m27quant").symlink_to(tmp_path / "theirs")
    for flags in ((), ("--resume",), ("--overwrite",)):
        ended = quantize(good, tmp_path / "out", *flags)
        assert (ended.code, ended.error["kind"]) == (5, "output")
        assert ".m27quant: a link" in ended.error["message"]
    assert (tmp_path / "theirs" / "work" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("model", ["org/name", "local"])
def test_out_is_looked_at_before_anything_long(
    model: str, good: Path, tmp_path: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before hundreds of gigabytes are fetched, or a data set is read."""

    def prepare(*args: object, **options: object) -> None:
        pytest.fail("too early")

    monkeypatch.setattr("m27quant.quantize.prepare", prepare)
    out = tmp_path / "out"
    out.mkdir()
    (out / "theirs").touch()
    assert quantize(good if model == "local" else model, out).code == 5
    assert quantize(good, good / "out").code == 2
    assert quantize(good, tmp_path / "new", "--resume", "--overwrite").code == 2
