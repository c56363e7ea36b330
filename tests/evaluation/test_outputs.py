"""`m27quant eval -o`, `--write-card`: what is written where, and what is left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from m27quant.cli.app import main
from tests.evaluation.conftest import Files

FEW = (
    "--device",
    "cpu",
    "--num-samples",
    "3",
    "--num-prompts",
    "2",
    "--max-tokens",
    "4",
    "--no-progress",
    "-q",
)


def run(files: Files, candidate: Path, *more: str | Path) -> int:
    """Exit code of an evaluation of one candidate."""
    asked = ("eval", candidate, "--reference", files.reference, "--dataset", files.rows, *FEW, *more)
    return main([*map(str, asked)])


@pytest.fixture
def copy(files: Files, tmp_path: Path) -> Path:
    return Path(shutil.copytree(files.max, tmp_path / "max"))


def test_page_card_and_report_are_written(files: Files, copy: Path, tmp_path: Path) -> None:
    page = tmp_path / "eval.html"
    before = json.loads((copy / "quantization_report.json").read_text())
    assert run(files, copy, "-o", page, "--write-card") == 0
    text = page.read_text(encoding="ascii")
    for words in ("Quantized against", "Greedy text in common", "by both texts", "no chat template"):
        assert words in text
    after = json.loads((copy / "quantization_report.json").read_text())
    kept = after.pop("evaluation")
    assert after == before
    row = kept["candidates"][0]
    assert f"{row['kl']['mean']['value']:.4f}" in (copy / "README.md").read_text()
    assert len(row["greedy"]["points"]) == 2
    assert row["health"]["num_texts"] == 2
    assert main(["report", str(copy), "-o", str(page)]) == 0, "a page of ours may be replaced"
    assert "Evaluation</h2>" in page.read_text()


def test_nothing_is_changed_unasked(files: Files, copy: Path) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    before = contents()
    assert run(files, copy) == 0
    assert contents() == before


def test_refusals_come_before_anything_is_computed(
    files: Files,
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("m27quant.evaluation.run.evaluate", lambda *a, **o: pytest.fail("computed"))
    foreign = tmp_path / "notes.html"
    foreign.write_text("<p>mine</p>")
    assert run(files, copy, "-o", foreign) == 5
    assert foreign.read_text() == "<p>mine</p>"
    (copy / "README.md").unlink()
    assert run(files, copy, "--write-card") == 2
    assert "README.md is not there" in " ".join(capsys.readouterr().err.split())
