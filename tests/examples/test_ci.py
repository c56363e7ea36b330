"""examples/ci: the files are what their readers expect, and their commands do what they say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from m27quant.cli.app import main
from tests.cli.conftest import nvfp4 as nvfp4


@pytest.fixture(scope="module")
def workflow(repository: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((repository / "examples/ci/github-workflow.yml").read_text())
    return loaded


@pytest.fixture(scope="module")
def hooks(repository: Path) -> list[dict[str, Any]]:
    loaded = yaml.safe_load((repository / "examples/ci/pre-commit-config.yaml").read_text())
    return [hook for repo in loaded["repos"] for hook in repo["hooks"]]


def commands(workflow: dict[str, Any]) -> list[list[str]]:
    """Every call of m27quant as its arguments, the workflow's variables filled in."""
    rows = [
        row
        for job in workflow["jobs"].values()
        for s in job["steps"]
        for row in s.get("run", "").splitlines()
    ]
    env = workflow["env"]
    filled = (
        re.sub(r"\$(\w+)", lambda m: str(env[m[1]]), row) for row in rows if row.startswith("m27quant ")
    )
    return [shlex.split(row)[1:] for row in filled]


def test_the_workflow_s_form(workflow: dict[str, Any]) -> None:
    assert set(workflow) == {"name", True, "permissions", "env", "jobs"}  # YAML 1.1 reads `on` as true
    assert workflow["permissions"] == {"contents": "read", "security-events": "write"}
    (job,) = workflow["jobs"].values()
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+(/[\w-]+)?@v\d+", step["uses"])


@pytest.mark.usefixtures("capsys")
def test_the_workflow_lets_a_good_checkpoint_pass(
    workflow: dict[str, Any], nvfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(nvfp4, tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    calls = commands(workflow)
    assert len(calls) == 4
    for call in calls:
        assert main(call) == 0, call
    results = json.loads((tmp_path / "verify.sarif").read_text())["runs"][0]["results"]
    assert {r["level"] for r in results} <= {"note"}
    assert (tmp_path / "verify.xml").exists()


@pytest.mark.usefixtures("capsys")
def test_the_gates_hold(
    workflow: dict[str, Any],
    hooks: list[dict[str, Any]],
    nvfp4: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(nvfp4, tmp_path / "checkpoint")
    (hook,) = hooks
    monkeypatch.chdir(tmp_path)
    assert set(hook) == {"id", "name", "entry", "language", "files", "pass_filenames"}
    assert re.search(hook["files"], "checkpoint/config.json")
    gate = shlex.split(hook["entry"])[1:]
    assert main(gate) == 0
    index = tmp_path / "checkpoint/model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    index.write_text(json.dumps(content))
    assert main(gate) == 1
    assert [main(call) for call in commands(workflow)] == [1, 1, 0, 0]
