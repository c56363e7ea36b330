"""Targets for the drafters' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import Shape, write_checkpoint
from tests.threads import one_thread as one_thread


@pytest.fixture(scope="session")
def random_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four layers without a tokenizer; to be read only."""
    folder = tmp_path_factory.mktemp("random-target")
    write_checkpoint(folder, Shape(num_hidden_layers=4), fp8=False)
    return folder
