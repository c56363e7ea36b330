"""Tests of kernels: small work is spread over threads too, so that every cut is tried."""

from __future__ import annotations

import pytest

from m27quant.kernels import native


@pytest.fixture(autouse=True)
def _small_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_BYTES_PER_THREAD", 1 << 12)
