"""The training scripts import each other by their bare names, as when they are run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "training"


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """A function that imports one of the scripts; none of them stays imported."""
    names = {path.stem for path in SCRIPTS.glob("*.py")}
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module
    sys.path.remove(str(SCRIPTS))
    for name in names & set(sys.modules):
        del sys.modules[name]
