"""Where nothing can be verified, a report file says so in its own format, and no former run's is left to be read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from m27quant.cli.app import main
from m27quant.cli.verify_options import FORMATS

Call = Callable[..., tuple[int, str, str]]
CODE = "M27-C023"


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Exit code, stdout and stderr of `m27quant verify ...`."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def call(*args: str | Path) -> tuple[int, str, str]:
        code = main(["verify", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("name", FORMATS)
def test_the_file_says_what_is_wrong(
    name: str, nvfp4: Path, tmp_path: Path, verify: Call, repository: Path
) -> None:
    path, empty = tmp_path / "report", tmp_path / "empty"
    empty.mkdir()
    assert verify(nvfp4, "--quick", "--output-format", name, "--output-file", path)[0] == 0
    passed = path.read_text()
    code, out, err = verify(empty, "--output-format", name, "--output-file", path)
    assert (code, out) == (3, "")
    assert f"{empty}: no weights" in err
    text = path.read_text()
    assert text != passed
    assert "no weights" in text
    assert CODE in text
    if name == "json":
        document = json.loads(text)
        jsonschema.validate(
            document, json.loads((repository / "docs/schemas/verify.schema.json").read_text())
        )
        assert (document["ok"], document["summary"]["error"], document["error"]["exit_code"]) == (False, 1, 3)
    elif name == "junit":
        suite = ET.fromstring(text)
        counts = {key: suite.get(key) for key in ("tests", "failures", "errors")}
        assert counts == {"tests": "1", "failures": "0", "errors": "1"}
        assert [case.tag for case in suite.iterfind(".//testcase/*")] == ["error"]
    elif name == "sarif":
        (run,) = json.loads(text)["runs"]
        assert run["invocations"][0]["executionSuccessful"] is False
        assert run["invocations"][0]["exitCode"] == 3
        assert [r["ruleId"] for r in run["results"]] == [CODE]
    elif name == "github":
        assert text.startswith("::error ")
    elif name == "gitlab":
        assert [issue["severity"] for issue in json.loads(text)] == ["critical"]
    else:
        assert text.splitlines()[-1].startswith("failed: 1 error")


def test_a_good_run_says_that_it_was_one(nvfp4: Path, verify: Call) -> None:
    document = json.loads(verify(nvfp4, "--quick", "--json")[1])
    assert document["error"] is None
    (run,) = json.loads(verify(nvfp4, "--quick", "--output-format", "sarif")[1])["runs"]
    assert run["invocations"] == [{"executionSuccessful": True}]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["{nvfp4}", "--select", "M27-X"], 2),
        (["{nvfp4}", "--baseline", "/no/such/file"], 2),
        (["{nvfp4}", "--quick", "--full"], 2),
        (["{nvfp4}", "--full", "--source", "/nowhere"], 3),
        (["/nowhere"], 3),
        (["org/name", "--offline"], 4),
    ],
)
def test_every_fault_ends_in_a_file_of_its_own(
    args: list[str], code: int, nvfp4: Path, tmp_path: Path, verify: Call
) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"ok": true}')
    args = [arg.format(nvfp4=nvfp4) for arg in args]
    assert verify(*args, "--output-format", "json", "--output-file", path)[:2] == (code, "")
    document = json.loads(path.read_text())
    assert (document["ok"], document["error"]["exit_code"]) == (False, code)


def test_a_run_that_is_killed_leaves_no_file_of_a_former_one(
    nvfp4: Path, tmp_path: Path, verify: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"ok": true}')

    def stop(*_: object, **__: object) -> None:
        assert not path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("m27quant.verify.run.read_container", stop)
    assert verify(nvfp4, "--output-file", path)[0] == 130
    assert not path.exists()


def test_the_jobs_summary_says_it_too(tmp_path: Path, verify: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert verify(tmp_path, "--output-format", "github")[0] == 3
    text = summary.read_text()
    assert text.startswith("### m27quant verify: failed")
    assert "no weights" in text.replace("\\", "")


def test_a_file_that_cannot_be_written_does_not_hide_the_fault(tmp_path: Path, verify: Call) -> None:
    """The folder goes away while it is verified."""
    code, out, err = verify(tmp_path / "nowhere", "--output-file", tmp_path / "no" / "report")
    assert (code, out) == (4, "")
    assert "report" in err


@pytest.mark.skipif(os.name != "posix", reason="needs /dev/stdout")
def test_dev_stdout_is_written_to_not_replaced(nvfp4: Path, tmp_path: Path) -> None:
    """Also where stdout is a regular file, which must not be taken for one of our reports."""
    link, target = tmp_path / "link", tmp_path / "target"
    target.write_text("old")
    link.symlink_to(target)
    code = "import sys; from m27quant.cli.app import main; sys.exit(main(sys.argv[1:]))"
    for path in ("/dev/stdout", str(link)):
        with (tmp_path / "out").open("wb") as out:
            done = subprocess.run(
                [sys.executable, "-c", code, "verify", nvfp4, "--quick", "--output-format=gitlab",
                 "--output-file", path],
                stdout=out, stderr=subprocess.PIPE, check=False,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert Path("/dev/stdout").is_symlink()
    assert link.is_symlink()
    assert json.loads(target.read_text())


def test_a_page_of_a_former_run_goes_too(
    nvfp4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, folder = tmp_path / "report.html", tmp_path / "checkpoint"
    shutil.copytree(nvfp4, folder)
    assert main(["report", str(folder), "-o", str(page)]) == 0
    shutil.rmtree(folder)
    assert main(["report", str(folder), "-o", str(page)]) == 3
    assert not page.exists()
    assert "no such folder" in capsys.readouterr().err
