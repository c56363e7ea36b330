"""docs/metrics.md: its examples are run, and no convention is missing in it."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

from m27quant.bench.reading import COUNTED
from m27quant.bench.tasks import TASKS
from m27quant.drafters import metrics


def test_the_worked_example(repository: Path) -> None:
    failed, tried = doctest.testfile(str(repository / "docs" / "metrics.md"), module_relative=False)
    assert failed == 0
    assert tried >= 20


def test_every_convention_source_and_task_is_explained(repository: Path) -> None:
    text = (repository / "docs" / "metrics.md").read_text(encoding="utf-8")
    conventions = [
        name for name, f in inspect.getmembers(metrics, inspect.isfunction)
        if f.__module__ == metrics.__name__ and name not in ("total", "speedup")
    ]  # fmt: skip
    assert len(conventions) == 11
    assert all(f"`{name}`" in text for name in conventions)
    assert all(f"metrics.{name}(" in text or name == "sglang_accept_length" for name in conventions)
    told = [*COUNTED, *(task.hub_id for task in TASKS.values())]
    assert [name for name in told if f"`{name}`" not in text and name != "runtime"] == []
