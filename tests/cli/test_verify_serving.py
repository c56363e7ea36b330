"""`m27quant verify` with --gpu, --tp, --ep, --context and --drafter: exit codes and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m27quant.cli.app import main
from tests import drafter_files as drafters


def facts(out: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(out)["facts"]
    return found


def test_a_way_that_works(nvfp4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wish = ["--engine", "vllm", "--gpu", "b200", "--tp", "1", "--context", "512"]
    assert main(["verify", str(nvfp4), "--quick", "--json", *wish]) == 0
    printed = facts(capsys.readouterr().out)
    assert printed["serving_vllm"]["moe_backend"] == "flashinfer_trtllm"
    assert "serving_sglang" not in printed


def test_a_way_that_does_not(nvfp4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(nvfp4), "--quick", "--tp", "7", "--select", "M27-V"]) == 1
    assert "M27-V001" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wish", [["--gpu", "a100"], ["--tp", "0"], ["--ep", "x"], ["--context", "-1"], ["--tp", "99999"]]
)
def test_wishes_that_are_none(nvfp4: Path, wish: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(nvfp4), "--quick", *wish]) == 2
    assert capsys.readouterr().out == ""


def test_a_drafter_of_another_model(nvfp4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, tensors = drafters.dflash()
    config["hidden_size"] = 8
    folder = drafters.write_drafter(tmp_path / "drafter", config, tensors)
    assert main(["verify", str(nvfp4), "--quick", "--drafter", str(folder), "-q"]) == 1
    assert "error M27-R009" in capsys.readouterr().out


def test_no_drafter_there(nvfp4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(nvfp4), "--quick", "--drafter", str(tmp_path / "nowhere")]) == 3
    assert "no such folder" in capsys.readouterr().err
