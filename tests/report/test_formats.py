"""Each rendering of a verification: what its readers require, and that hostile text stays text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from m27quant.report import document, github, gitlab, human, junit, sarif
from m27quant.verify.findings import VerifyResult
from tests.report.results import ALL, CLEAN, EVIL, MANY, MIXED, finding, result

EVERY_FORMAT = [module.render for module in (human, document, junit, sarif, github, gitlab)]


@pytest.mark.parametrize("render", EVERY_FORMAT, ids=lambda f: f.__module__.rpartition(".")[2])
@pytest.mark.parametrize("name", ALL)
def test_nothing_invisible_gets_through(render: Any, name: str) -> None:
    text = render(ALL[name])
    assert render(ALL[name]) == text
    assert {c for c in text if not c.isprintable()} <= {"\n"}
    text.encode("utf-8")


def test_human() -> None:
    assert human.render(MIXED) == (
        "checkpoint  out/m27\n"
        "level       default\n"
        "layers      5\n"
        "experts     8\n"
        "size bytes  12,345,678\n"
        "\n"
        "severity  code       places  what\n"
        "error     M27-T001        3  expert tensor missing\n"
        "warning   M27-S004        1  scale far out\n"
        "note      M27-T020        1  attention is F32\n"
        "\n"
        "error M27-T001 expert tensor missing\n"
        "  layer 3 expert 17: w1.weight is missing\n"
        "    expected  U8 [32, 64]\n"
        "    found     nothing\n"
        "    also      2 more: a.w1.weight, b.w1.weight\n"
        "  engines    vllm: loads without a word; sglang: stops\n"
        "  next step  quantize the layer again\n"
        "\n"
        "warning M27-S004 scale far out\n"
        "  layer 1 expert 2: input_scale 90 times the median\n"
        "    expected  U8 [32, 64]\n"
        "    found     nothing\n"
        "  engines    vllm: loads without a word; sglang: stops\n"
        "  next step  quantize the layer again\n"
        "\n"
        "note M27-T020 attention is F32\n"
        "  attention is F32\n"
        "    expected  U8 [32, 64]\n"
        "    found     nothing\n"
        "  next step  quantize the layer again\n"
        "\n"
        "failed: 1 error, 1 warning, 1 note in 4 checks"
    )
    assert human.render(CLEAN).endswith("12,345,678\n\npassed: no findings in 4 checks")
    assert human.concise(CLEAN) is None
    assert human.concise(MIXED).splitlines()[0] == (  # type: ignore[union-attr]  # there are findings
        "error M27-T001 layer 3 expert 17: w1.weight is missing"
    )


def test_human_says_the_next_step_once_per_check() -> None:
    assert human.render(MANY).count("next step") == 3
    assert human.render(MANY).count("w1.weight is missing") == 120


def test_json_keeps_names_and_is_by_its_schema(repository: Path) -> None:
    schema = json.loads((repository / "docs/schemas/verify.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for made in ALL.values():
        text = document.render(made)
        assert text.isascii()
        validator.validate(json.loads(text))
    found = json.loads(document.render(EVIL))["findings"][0]["tensor"]
    assert found == finding(tensor=EVIL.checkpoint).tensor.replace("\ud800", "\\ud800")  # type: ignore[union-attr]
    assert json.loads(document.render(EVIL))["facts"].popitem()[1][1] == {"n": None}
    broken = json.loads(document.render(MIXED))
    del broken["findings"][0]["next_step"]
    assert not validator.is_valid(broken)


def test_json_fingerprints_are_unique_and_stable() -> None:
    twins = result(finding(), finding(message="worded otherwise"))
    marks = [f["fingerprint"] for f in document.document(twins)["findings"]]
    assert marks == [marks[0], f"{marks[0]}-2"]
    assert document.document(result(finding(count=9)))["findings"][0]["fingerprint"] == marks[0]
    assert document.document(result(finding(layer=4)))["findings"][0]["fingerprint"] != marks[0]


@pytest.mark.parametrize(
    ("made", "fail_on", "failures"),
    [(CLEAN, "error", 0), (MIXED, "error", 1), (MIXED, "warning", 2), (EVIL, "warning", 2)],
)
def test_junit(made: VerifyResult, fail_on: str, failures: int) -> None:
    root = ET.fromstring(junit.render(made, fail_on=fail_on))
    (suite,) = root
    cases = suite.findall("testcase")
    assert (root.tag, suite.tag, len(cases)) == ("testsuites", "testsuite", 4)
    for node in (root, suite):
        assert (node.get("tests"), node.get("failures")) == ("4", str(failures))
    assert len(suite.findall("testcase/failure")) == failures
    assert all(case.get("name") and case.get("classname") for case in cases)
    assert [case.get("name", "").partition(" ")[0] for case in cases] == list(made.checks_run)
    outputs = 3 - failures if made.findings else 0
    assert len(suite.findall("testcase/system-out")) == outputs


def test_junit_is_utf_8_in_every_locale() -> None:
    made = (
        "from tests.report.results import EVIL; from m27quant.report import junit; print(junit.render(EVIL))"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.run(
        [sys.executable, "-c", made],
        env=ascii_only,
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.startswith(b"<?xml version='1.0' encoding='utf-8'?>")


def test_junit_says_what_and_the_next_step() -> None:
    failure = ET.fromstring(junit.render(MIXED)).find(".//failure")
    assert failure is not None
    assert failure.get("message") == "layer 3 expert 17: w1.weight is missing"
    assert "next step: quantize the layer again" in (failure.text or "")


@pytest.mark.parametrize("name", ALL)
def test_sarif_has_what_readers_require(name: str) -> None:
    made = ALL[name]
    log = json.loads(sarif.render(made))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["shortDescription"]["text"]
        assert rule["help"]["text"]
        assert rule["defaultConfiguration"]["level"] in ("error", "warning", "note")
    assert len(run["results"]) == len(made.findings)
    for found in run["results"]:
        assert rules[found["ruleIndex"]]["id"] == found["ruleId"]
        assert found["message"]["text"]
        assert "](" not in found["message"]["text"]
        assert found["level"] in ("error", "warning", "note")
        place = found["locations"][0]["physicalLocation"]
        assert re.fullmatch(r"[A-Za-z0-9._~%/-]+", place["artifactLocation"]["uri"])
        assert place["region"]["startLine"] == 1
    marks = [found["partialFingerprints"]["m27quant/v1"] for found in run["results"]]
    assert len(set(marks)) == len(marks)


def test_sarif_keeps_below_what_is_shown_of_a_run() -> None:
    log = json.loads(sarif.render(result(*(finding(layer=n) for n in range(sarif.MAX_RESULTS + 7)))))
    (run,) = log["runs"]
    assert len(run["results"]) == sarif.MAX_RESULTS
    (notification,) = run["invocations"][0]["toolExecutionNotifications"]
    assert notification["message"]["text"].startswith("7 more findings")


def test_github() -> None:
    *commands, last = github.render(MIXED).splitlines()
    assert [command.split(" ")[0] for command in commands] == ["::error", "::warning", "::notice"]
    assert commands[0] == (
        "::error file=out/m27/model-00003-of-00006.safetensors,title=M27-T001 expert tensor missing::"
        "layer 3 expert 17: w1.weight is missing%0Aexpected: U8 [32, 64]%0Afound: nothing%0A"
        "also: 2 more: a.w1.weight, b.w1.weight%0Aengines: vllm: loads without a word; sglang: stops%0A"
        "next step: quantize the layer again"
    )
    assert commands[1].startswith("::warning file=out/m27/config.json,")
    assert last == "m27quant verify: 1 error, 1 warning, 1 note"


def test_github_folds_what_the_runner_would_drop() -> None:
    rows = github.render(MANY).splitlines()
    for command, noun in (("error", "errors"), ("warning", "warnings"), ("notice", "notes")):
        mine = [row for row in rows if row.startswith(f"::{command} ")]
        assert len(mine) == github.MAX_ANNOTATIONS
        assert mine[-1].startswith(f"::{command} title=and 31 {noun} more::M27-")
        assert mine[-1].endswith(" (31)")


def test_github_commands_cannot_be_forged() -> None:
    rows = github.render(EVIL).splitlines()
    assert len(rows) == 4
    for row in rows[:3]:
        match = re.fullmatch(r"::(error|warning|notice) file=([^,:]*),title=([^,:]*)::(.*)", row)
        assert match is not None
        assert set(re.findall(r"%..", match[4])) <= {"%25", "%0A"}
    assert not rows[3].startswith("::")


def test_step_summary_is_text_and_fits() -> None:
    text = github.step_summary(MIXED)
    assert text.startswith("### m27quant verify: failed\n\nout\\/m27: 1 error, 1 warning, 1 note in 4 checks")
    assert "| error | M27\\-T001 |" in text
    for row in github.step_summary(EVIL).splitlines()[5:]:
        assert len(re.findall(r"(?<!\\)\|", row)) == 6
        assert not re.search(r"(?<!\\)[<@`\[]", row)
    assert github.step_summary(CLEAN).startswith("### m27quant verify: passed\n")
    huge = result(*(finding(layer=n, message="x" * 1900) for n in range(1000)))
    assert len(github.step_summary(huge).encode()) < github.MAX_SUMMARY_BYTES
    assert re.search(r"\n\d+ findings more\n$", github.step_summary(huge))


@pytest.mark.parametrize("name", ALL)
def test_gitlab(name: str) -> None:
    made = ALL[name]
    issues = json.loads(gitlab.render(made))
    assert len(issues) == len(made.findings)
    assert len({issue["fingerprint"] for issue in issues}) == len(issues)
    for issue in issues:
        assert set(issue) == {"description", "check_name", "fingerprint", "severity", "location"}
        assert issue["severity"] in ("info", "minor", "major", "critical", "blocker")
        assert issue["location"]["lines"] == {"begin": 1}
        assert issue["location"]["path"]


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "..", "a\\b", "C:x", ""])
def test_a_name_that_leaves_the_folder_is_no_location(file: str) -> None:
    (issue,) = json.loads(gitlab.render(result(finding(file=file))))
    assert issue["location"]["path"] == "out/m27/config.json"
