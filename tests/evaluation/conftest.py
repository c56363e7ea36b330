"""A random model, two NVFP4 checkpoints of it, and rows of token ids of different lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from m27quant import quantize_checkpoint
from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.quantized import open_checkpoint
from m27quant.checkpoint.source import Source
from m27quant.runtime.streamed import Precision
from tests.checkpoints import Shape, write_checkpoint, write_rows

CPU = torch.device("cpu")
PLAIN = Precision("bf16", "fp8")
"""W4A16 with an FP8 cache."""
Models = tuple[Source, Source]


@dataclass(frozen=True)
class Files:
    """Nobody may change them."""

    reference: Path
    max: Path
    mse: Path
    rows: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("evaluation")
    reference = write_checkpoint(folder / "fp8", Shape())
    calibration = write_rows(folder / "calibration.jsonl", rows=6, seed=3)
    for name, recipe in (("max", "nvfp4_experts_only-fp8_kv"), ("mse", "nvfp4_experts_only_mse-fp8_kv")):
        quantize_checkpoint(
            str(reference),
            folder / name,
            recipe=recipe,
            dataset=str(calibration),
            num_samples=6,
            device="cpu",
        )
    rows = write_rows(folder / "rows.jsonl", rows=10, longest=24, seed=5)
    return Files(reference, folder / "max", folder / "mse", rows)


@pytest.fixture(scope="session")
def models(files: Files) -> Iterator[Models]:
    """The reference and an NVFP4 checkpoint of it, opened."""
    with open_checkpoint(Location(files.reference)) as source, open_checkpoint(Location(files.max)) as nvfp4:
        yield source, nvfp4
