"""Tests of small models, and one that writes sentences."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.threads import one_thread as one_thread


@pytest.fixture(scope="session")
def tiny_nvfp4(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The trained model in NVFP4 with an FP8 cache; a few samples are enough for scales that can be computed with."""
    from m27quant import quantize_checkpoint

    source, out = repository / "examples/tiny-m27", tmp_path_factory.mktemp("tiny") / "nvfp4"
    rows = str(source / "calibration.jsonl")
    quantize_checkpoint(str(source), out, dataset=rows, num_samples=8, seq_len=64)
    return out
