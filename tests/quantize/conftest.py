"""Tests of small models; modules have a `model`, and an `out` that was quantized from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.quantize.models import Model, quantized
from tests.threads import one_thread as one_thread


@pytest.fixture(scope="module")
def by_mse(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module's model with block scales of least squared error."""
    recipe = "nvfp4_experts_only_mse-fp8_kv"
    return quantized(model, tmp_path_factory.mktemp("mse") / "out", recipe=recipe)


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """Of `out`, to be changed."""
    return Path(shutil.copytree(out, tmp_path / "copy"))
