"""`m27quant report`: the page of a real checkpoint, what it replaces, and how a browser takes it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from m27quant.cli.app import main
from tests.cli.conftest import Run

Call = Callable[..., tuple[int, str, str]]
CHROMIUM = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
QUIET_BROWSER = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
)  # fmt: skip


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code, stdout and stderr of `m27quant report ...`."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        code = main(["report", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_our_checkpoint_has_its_page(nvfp4: Path, tmp_path: Path, report: Call) -> None:
    target = tmp_path / "report.html"
    assert report(nvfp4, "-o", target) == (0, f"passed: 1 note; written to {target}\n", "")
    page = target.read_text(encoding="ascii")
    for words in ("Passed", "mean weight SQNR", "Routed tokens", "calibration.jsonl", "M27-F025"):
        assert words in page
    assert "contradict" not in page
    assert "is not what the tensors hold" not in page


def test_modes(nvfp4: Path, tmp_path: Path, report: Call) -> None:
    target = tmp_path / "report.html"
    assert report(nvfp4, "-o", target, "-q") == (0, f"{target}\n", "")
    code, out, err = report(nvfp4, "--output-file", target, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "schema_version": 1,
        "output_file": str(target),
        "bytes": target.stat().st_size,
        "ok": True,
        "summary": {"error": 0, "warning": 0, "note": 1},
    }


def test_the_page_goes_to_stdout(nvfp4: Path, tmp_path: Path, report: Call) -> None:
    report(nvfp4, "-o", tmp_path / "report.html")
    assert report(nvfp4, "-o", "-") == (0, (tmp_path / "report.html").read_text(), "")
    code, out, _ = report(nvfp4, "-o", "-", "--json")
    assert (code, out) == (2, "")


def test_without_its_report_the_page_says_so(nvfp4: Path, tmp_path: Path, report: Call) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(nvfp4, folder)
    (folder / "quantization_report.json").unlink()
    code, page, _ = report(folder, "-o", "-")
    assert code == 0
    assert "There is no quantization_report.json" in page
    assert "weight_scale_2 by layer" in page


def test_a_broken_checkpoint_shows_its_verdict(nvfp4: Path, tmp_path: Path, report: Call) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(nvfp4, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = "model.layers.3.block_sparse_moe.experts.5.w1.weight"
    del index["weight_map"][lost]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, out, _ = report(folder, "-o", tmp_path / "report.html")
    assert code == 0
    assert out.startswith("failed: ")
    page = (tmp_path / "report.html").read_text()
    assert "Failed" in page
    assert lost in page


def test_no_checkpoint_gives_no_page(tmp_path: Path, report: Call) -> None:
    code, out, err = report(tmp_path, "-o", tmp_path / "report.html")
    assert (code, out) == (3, "")
    assert "no weights" in err
    assert not (tmp_path / "report.html").exists()


def test_only_our_own_pages_are_replaced(nvfp4: Path, tmp_path: Path, report: Call) -> None:
    target = tmp_path / "thesis.html"
    target.write_text("<!doctype html> years of work")
    code, out, err = report(nvfp4, "-o", target)
    assert (code, out) == (5, "")
    assert "--overwrite" in err
    assert target.read_text() == "<!doctype html> years of work"
    assert report(nvfp4, "-o", target, "--overwrite")[0] == 0
    assert report(nvfp4, "-o", target)[0] == 0
    assert report(nvfp4, "-o", tmp_path)[0] == 5
    assert report(nvfp4, "-o", tmp_path / "no" / "where.html")[0] == 4


def test_it_is_asked_as_verify_is(nvfp4: Path, tmp_path: Path, report: Call, repository: Path) -> None:
    target, tiny = tmp_path / "report.html", repository / "examples/tiny-m27"
    text = [
        "--logits",
        "--text",
        tiny / "heldout.txt",
        "--num-samples",
        "1",
        "--seq-len",
        "64",
        "--device",
        "cpu",
    ]
    serving = ["--gpu", "b200", "--tp", "2", "--engine", "vllm"]
    args = ["--full", "--source", tiny, *text, *serving, "--no-progress"]
    assert report(nvfp4, "-o", target, *args)[0] == 0
    page = target.read_text()
    for words in (
        "level full",
        "Against its source",
        "KL divergence",
        "SQNR of hidden states",
        "Serving",
        "vLLM 0.33",
    ):
        assert words in page
    assert "SGLang 0.5.23" not in page
    code, out, err = report(nvfp4, "-o", target, "--source", tiny)
    assert (code, out) == (2, "")
    assert "--full" in err


def test_accepted_findings_are_left_out_and_counted(nvfp4: Path, tmp_path: Path, report: Call) -> None:
    accepted, target = tmp_path / "accepted.json", tmp_path / "report.html"
    assert main(["verify", str(nvfp4), "--write-baseline", str(accepted)]) == 0
    code, _, err = report(nvfp4, "-o", target, "--baseline", accepted)
    assert (code, err) == (0, "1 finding accepted in " + f"{accepted}\n")
    page = target.read_text()
    assert "no findings, 1 accepted" in page
    assert "M27-F025" not in page
    assert report(nvfp4, "-o", target, "--ignore", "M27-F025")[0] == 0
    assert "M27-F025" not in target.read_text()


def test_an_output_file_is_asked_for(nvfp4: Path, report: Call) -> None:
    assert report(nvfp4)[0] == 2


def test_as_a_process(nvfp4: Path, m27quant: Run) -> None:
    process = m27quant("report", str(nvfp4), "-o", "-", env={"LC_ALL": "C"})
    assert process.returncode == 0
    assert process.stdout.startswith("<!doctype html>")


# -- in a browser ----------------------------------------------------------------------------------


def opened(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's DOM after its script ran, and what the browser's console said."""
    assert CHROMIUM is not None
    process = subprocess.run(
        [CHROMIUM, *QUIET_BROWSER, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return process.stdout, [line for line in process.stderr.splitlines() if "CONSOLE" in line]


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium or Chrome on PATH to open the page in"
)


@needs_browser
def test_a_browser_opens_it_without_a_word(nvfp4: Path, tmp_path: Path, report: Call) -> None:
    target = tmp_path / "report.html"
    report(nvfp4, "-o", target)
    dom, said = opened(target, tmp_path / "profile")
    assert said == []
    assert '<button type="button" id="theme">' in dom  # hidden until the script runs
    # The same page with a script that is not ours: the policy keeps it from running, and the console says so.
    target.write_text(target.read_text().replace("<main", "<script>document.title='owned'</script><main"))
    dom, said = opened(target, tmp_path / "profile")
    assert said
    assert "<title>owned" not in dom


@needs_browser
def test_the_arrow_keys_read_the_map(nvfp4: Path, tmp_path: Path, report: Call) -> None:
    """Two steps down and one to the right, by a script that the policy of this copy lets in."""
    target = tmp_path / "report.html"
    report(nvfp4, "-o", target)
    keys = """<script>for (const key of ["ArrowDown", "ArrowDown", "ArrowRight"])
    document.querySelector("svg.map").dispatchEvent(new KeyboardEvent("keydown", { key }));</script></body>"""
    page = target.read_text().replace("</body>", keys)
    target.write_text(re.sub("script-src 'sha256-[^']+'", "script-src 'unsafe-inline'", page))
    dom, said = opened(target, tmp_path / "profile")
    assert said == []
    recorded = json.loads((nvfp4 / "quantization_report.json").read_text())["layers"][2]
    worst = min(recorded["sqnr_db"][p][1] for p in ("w1", "w2", "w3"))
    assert (
        f"layer 2, expert 1 \u00b7 SQNR: {worst:.4g} \u00b7 Routed tokens: {recorded['routed_tokens'][1]}"
        in dom
    )
