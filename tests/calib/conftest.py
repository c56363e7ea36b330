"""Tests of small models."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.threads import one_thread as one_thread


@pytest.fixture(scope="module")
def tiny() -> Path:
    return Path(__file__).parents[2] / "examples/tiny-m27"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
