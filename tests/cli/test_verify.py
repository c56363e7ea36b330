"""`m27quant verify` from the command line: exit codes, streams, every format, baselines."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from m27quant.cli.app import main
from m27quant.cli.verify_options import FORMATS
from tests.cli.conftest import Run
from tests.report.results import HOSTILE

LAYER = "model.layers.3.block_sparse_moe.experts.5"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code, stdout and stderr of `m27quant verify ...`."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        code = main(["verify", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def broken(nvfp4: Path, tmp_path: Path) -> Path:
    """The checkpoint with an index that lost one matrix."""
    folder = tmp_path / "broken"
    shutil.copytree(nvfp4, folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][f"{LAYER}.w1.weight"]
    path.write_text(json.dumps(index))
    return folder


def findings(out: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(out)["findings"]
    return found


def test_ours_is_clean_at_every_level(nvfp4: Path, verify: Call) -> None:
    for level in ([], ["--quick"]):
        for engine in ([], ["--engine", "vllm"], ["--engine", "sglang"]):
            code, out, err = verify(nvfp4, *level, *engine, "--fail-on", "warning")
            assert (code, err) == (0, "")
            assert out.splitlines()[0].split() == ["checkpoint", str(nvfp4)]
            assert out.splitlines()[-1].startswith("passed: ")


def test_findings_end_in_1_with_the_data_on_stdout(broken: Path, verify: Call) -> None:
    code, out, err = verify(broken)
    assert code == 1
    assert f"{LAYER}.w1.weight" in out
    assert "\n  next step  " in out
    assert err.startswith(f"error: {broken}: ")
    assert "\n\nhint: `m27quant explain M27-" in err


def test_every_mode(broken: Path, verify: Call, repository: Path) -> None:
    schema = json.loads((repository / "docs/schemas/verify.schema.json").read_text())
    for flags in (["--json"], ["--output-format", "json"], ["--output-format=json"]):
        code, out, err = verify(broken, *flags)
        assert code == 1
        jsonschema.validate(json.loads(out), schema)
        assert json.loads(err)["error"]["kind"] == "findings"
    code, out, err = verify(broken, "--quiet")
    assert code == 1
    assert all(row.split(" ")[0] in ("error", "warning", "note") for row in out.splitlines())
    assert err.startswith("error: ")


def test_every_format(broken: Path, nvfp4: Path, verify: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    for folder, expected in ((nvfp4, 0), (broken, 1)):
        for name in FORMATS:
            code, out, err = verify(folder, "--output-format", name)
            assert code == expected, name
            assert bool(err) == bool(expected), name
            if name in ("json", "sarif", "gitlab"):
                json.loads(out)
            elif name == "junit":
                assert ET.fromstring(out).get("failures") == str(len(_codes(folder, verify)))
            elif name == "github":
                assert out.splitlines()[-1].startswith("m27quant verify: ")


def _codes(folder: Path, verify: Call) -> set[str]:
    return {f["code"] for f in findings(verify(folder, "--json")[1]) if f["severity"] == "error"}


@pytest.mark.parametrize("name", FORMATS)
def test_output_file_takes_the_place_of_stdout(
    name: str, broken: Path, tmp_path: Path, verify: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    path = tmp_path / "report"
    printed = verify(broken, "--output-format", name)[1]
    code, out, _ = verify(broken, "--output-format", name, "--output-file", path)
    assert (code, out) == (1, "")
    assert path.read_text() == printed
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("broken", "report")] == []


def test_an_output_file_that_cannot_be_written_is_the_surroundings_fault(nvfp4: Path, verify: Call) -> None:
    code, out, err = verify(nvfp4, "--quick", "--output-file", "/nowhere/report")
    assert (code, out) == (4, "")
    assert "/nowhere/report" in err


def test_step_summary(broken: Path, tmp_path: Path, verify: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.md"
    path.write_text("what an earlier step wrote\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    assert verify(broken)[0] == 1
    assert path.read_text() == "what an earlier step wrote\n"
    assert verify(broken, "--output-format", "github")[0] == 1
    first, second = path.read_text().splitlines()[:2]
    assert (first, second) == ("what an earlier step wrote", "### m27quant verify: failed")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "summary.md"))
    code, out, err = verify(broken, "--output-format", "github")
    assert (code, out.startswith("::error ")) == (1, True)
    assert err.startswith("warning: GITHUB_STEP_SUMMARY: ")


def test_paths_are_relative_where_ci_looks(
    broken: Path, verify: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(broken.parent)
    issues = json.loads(verify(broken, "--output-format", "gitlab")[1])
    assert {issue["location"]["path"].split("/")[0] for issue in issues} == {"broken"}


def test_select_and_ignore(broken: Path, verify: Call) -> None:
    (code,) = _codes(broken, verify)
    assert verify(broken, "--ignore", code)[0] == 0
    assert verify(broken, "--ignore", code[:5])[0] == 0
    assert verify(broken, "--select", code)[0] == 1
    assert verify(broken, "--select", "M27-S")[0] == 0
    assert verify(broken, "--select", "M27-S", "--select", code)[0] == 1


def test_only_selected_checks_count_as_run(nvfp4: Path, verify: Call) -> None:
    def run(*flags: str) -> set[str]:
        return set(json.loads(verify(nvfp4, "--json", *flags)[1])["checks_run"])

    everything = run()
    assert run("--select", "M27-S") == {code for code in everything if code.startswith("M27-S")}
    assert run("--ignore", "M27-S") == {code for code in everything if not code.startswith("M27-S")}
    assert run("--quick") < everything
    code, out, err = verify(nvfp4, "--quick", "--select", "M27-S001")
    assert (code, out) == (2, "")
    assert "no check is left" in err


def test_exit_zero_and_fail_on(broken: Path, verify: Call) -> None:
    code, out, err = verify(broken, "--exit-zero")
    assert (code, err) == (0, "")
    assert f"{LAYER}.w1.weight" in out
    assert verify(broken, "--exit-zero", "--json")[0] == 0
    (error,) = _codes(broken, verify)
    (broken / "stray.safetensors").write_bytes((broken / "config.json").read_bytes())
    assert verify(broken, "--ignore", error)[0] == 0
    assert verify(broken, "--ignore", error, "--fail-on", "warning")[0] == 1


def test_baseline(broken: Path, tmp_path: Path, verify: Call) -> None:
    path = tmp_path / "accepted.json"
    assert verify(broken)[0] == 1
    code, _, err = verify(broken, "--write-baseline", path)
    assert (code, err.endswith(f" accepted in {path}\n")) == (0, True)
    assert verify(broken, "--baseline", path)[0] == 0
    document = json.loads(verify(broken, "--baseline", path, "--json")[1])
    assert (document["findings"], document["accepted"] > 0) == ([], True)
    (broken / "config.json").write_text("{")
    assert verify(broken, "--baseline", path)[0] in (1, 3)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--engine", "trt"], "'trt' is none of vllm, sglang"),
        (["--output-format", "xml"], "'xml' is none of human, json, junit, sarif, github, gitlab"),
        (["--json", "--output-format", "junit"], "--json and --output-format junit exclude each other"),
        (["--fail-on", "note"], "'note' is none of error, warning"),
        (["--select", "M27-X"], "unknown check 'M27-X'"),
        (["--ignore", ""], "unknown check ''"),
        (["--baseline", "/no/such/file"], "/no/such/file: no such file"),
    ],
)
def test_wrong_usage_ends_in_2(flags: list[str], says: str, nvfp4: Path, verify: Call) -> None:
    code, out, err = verify(nvfp4, "--quick", *flags)
    assert (code, out) == (2, "")
    assert says in err
    assert "hint: " in err or "--json" in flags


def test_what_is_no_checkpoint_ends_in_3(tmp_path: Path, verify: Call) -> None:
    for flags in ([], ["--quick"], ["--exit-zero"], ["--output-format", "junit"]):
        code, out, err = verify(tmp_path, *flags)
        assert (code, out) == (3, ""), flags
        assert err.startswith("error: ")


def test_the_installed_program(broken: Path, nvfp4: Path, m27quant: Run) -> None:
    clean = m27quant("verify", str(nvfp4), "--quick")
    assert (clean.returncode, clean.stderr) == (0, "")
    found = m27quant("verify", str(broken), "--quick", "--json")
    assert found.returncode == 1
    assert findings(found.stdout)[0]["severity"] == "error"
    assert json.loads(found.stderr)["error"]["exit_code"] == 1


def test_quick_imports_no_torch(nvfp4: Path) -> None:
    probe = (
        "import json, sys; from m27quant.cli.app import main; code = main(sys.argv[1:]); "
        "print(json.dumps([code, sorted({'torch', 'numpy', 'transformers'} & set(sys.modules))]), file=sys.stderr)"
    )
    process = subprocess.run(
        [sys.executable, "-c", probe, "verify", str(nvfp4), "--quick"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(process.stderr) == [0, []]


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_names_stay_text(
    name: str, broken: Path, verify: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index = broken / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = next(iter(content["weight_map"].values()))
    content["weight_map"][HOSTILE] = shard
    content["weight_map"][f"{LAYER}.w1.{HOSTILE}"] = HOSTILE
    index.write_text(json.dumps(content))
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    code, out, err = verify(broken, "--output-format", name)
    assert code == 1
    written = summary.read_text() if name == "github" else ""
    for text in (out, err, written):
        assert {c for c in text if not c.isprintable()} <= {"\n"}
        text.encode("utf-8")
    forged = [
        row for row in out.splitlines() if row.startswith("::") and not re.match(r"::\w+ (file|title)=", row)
    ]
    assert forged == []
