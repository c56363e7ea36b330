"""The batch examples, run by a scheduler of a few lines: what they make is one run's bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from m27quant import quantize_checkpoint
from tests.checkpoints import write_checkpoint, write_rows
from tests.faults.harness import tree
from tests.quantize.test_parts import SIDECARS, SMALL

SBATCH = """#!/bin/bash
# Runs a job at once, each index of its array in turn, and prints a job number.
set -euo pipefail
last=0
for argument; do
    case $argument in --array=0-*) last=${argument#--array=0-} ;; esac
    script=$argument
done
for ((index = 0; index <= last; index++)); do
    SLURM_ARRAY_TASK_ID=$index SLURM_ARRAY_TASK_COUNT=$((last + 1)) bash "$script" >&2
done
echo 7
"""
SRUN = """#!/bin/bash
exec "$@"
"""
PROGRAM = """#!/bin/bash
exec "{python}" -m m27quant "$@"
"""
RECORD = """#!/bin/bash
printf '%s\\n' "$*" >> "$CALLS"
"""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder of commands, first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {"sbatch": SBATCH, "srun": SRUN, "m27quant": PROGRAM.format(python=sys.executable)}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def environment(commands: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **more}


def test_slurm_scripts_make_one_runs_bytes(repository: Path, commands: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", SMALL)
    for name in SIDECARS:
        (model / name).write_bytes((repository / "examples/tiny-m27" / name).read_bytes())
    rows = write_rows(tmp_path / "rows.jsonl", vocab_size=SMALL.vocab_size)
    script = repository / "examples/slurm/submit.sh"
    command = ["bash", str(script), str(model), str(tmp_path / "work"), str(tmp_path / "out"), "2", "4"]
    ended = subprocess.run(
        command,
        env=environment(commands, DATA=str(rows), DEVICE="cpu"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "jobs: calibrate 7, pack 7, assemble 7" in ended.stdout
    quantize_checkpoint(str(model), tmp_path / "whole", dataset=str(rows), device="cpu")
    made, expected = tree(tmp_path / "out"), tree(tmp_path / "whole")
    assert {n: d for n, d in made.items() if not n.startswith(".")} == expected


@pytest.mark.parametrize(("layers", "count"), [(62, 8), (3, 4)])
def test_kubernetes_indices_cover_every_layer_once(
    layers: int, count: int, repository: Path, commands: Path, tmp_path: Path
) -> None:
    job = yaml.safe_load((repository / "examples/kubernetes/pack-job.yaml").read_text())
    assert job["spec"]["completionMode"] == "Indexed"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(given["COUNT"]) == job["spec"]["completions"]
    (commands / "m27quant").write_text(RECORD)
    calls = tmp_path / "calls"
    for index in range(count):
        numbers = {"LAYERS": str(layers), "COUNT": str(count), "JOB_COMPLETION_INDEX": str(index)}
        env = environment(commands, **(given | numbers), CALLS=str(calls))
        subprocess.run([*container["command"], *container["args"]], env=env, timeout=60, check=True)
    runs = [line.split()[line.split().index("--layers") + 1] for line in calls.read_text().splitlines()]
    taken = [layer for run in runs for layer in range(*map(int, run.split(":")))]
    assert taken == list(range(layers))
    assert "/data/parts/001 --ranges /data/calibration/calibration.json" in calls.read_text()
