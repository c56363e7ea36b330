"""What every test may count on: no network, no user's files, one terminal size, fixed seeds."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, and no deadline: a busy machine is not a fault of the code.
hypothesis.settings.register_profile("m27quant", deadline=None, derandomize=True)
hypothesis.settings.load_profile("m27quant")

# Read by huggingface_hub and datasets when they are imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Workers side by side share the cores instead of each taking all of them.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

TERMINAL = {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}
UNSET = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Figures that tests measured (`record_property`) and did not judge, from whichever worker they came."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            test = report.nodeid.rpartition("::")[2]
            terminalreporter.write_line(f"measured in {test}: {name}: {value}")


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A home of its own for the Hub's files, an 80x24 terminal, none of the user's settings."""
    home = tmp_path_factory.mktemp("hf-home")
    monkeypatch.setenv("HF_HOME", str(home))
    for name in [name for name in os.environ if name.startswith("M27QUANT_")]:
        monkeypatch.delenv(name)
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    for name, value in TERMINAL.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """A command that was run in this process sends the package's log to its own streams: not after its test."""
    log = logging.getLogger("m27quant")
    before = list(log.handlers), log.propagate, log.level
    yield
    log.handlers, log.propagate = before[0], before[1]
    log.setLevel(before[2])


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every generator that is loaded starts where it starts in every run."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).parents[1]
