"""Good checkpoints of three recipes, made once, and copies of one to break."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from m27quant import quantize_checkpoint
from tests.checkpoints import Shape, write_checkpoint, write_rows
from tests.threads import one_thread as one_thread

RECIPES = {
    "fp8_kv": "nvfp4_experts_only-fp8_kv",
    "fp8_kv_cast": "nvfp4_experts_only-fp8_kv_cast",
    "bf16_kv": "nvfp4_experts_only",
}
SMALL = Shape(
    hidden_size=48,
    intermediate_size=32,
    num_hidden_layers=12,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rotary_dim=8,
    num_local_experts=4,
    vocab_size=2048,
)
"""Twelve layers, so that a pattern for layer 1 can hit layers 10 and 11."""
SIDECARS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="session")
def fast_folder() -> Iterator[Path]:
    """A folder in memory, where there is one: a checkpoint is copied for every fault."""
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and os.access(shared, os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix="m27quant-", dir=shared if in_memory else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def checkpoints(fast_folder: Path, repository: Path) -> dict[str, Path]:
    """One good checkpoint per recipe.  Nobody may change them."""
    model = write_checkpoint(fast_folder / "source", SMALL)
    for name in SIDECARS:
        shutil.copy(repository / "examples/tiny-m27" / name, model / name)
    rows = write_rows(fast_folder / "rows.jsonl", vocab_size=SMALL.vocab_size, rows=16)
    for name, recipe in RECIPES.items():
        quantize_checkpoint(str(model), fast_folder / name, recipe=recipe, dataset=str(rows))
    return {name: fast_folder / name for name in RECIPES}


@pytest.fixture
def folder(checkpoints: dict[str, Path], fast_folder: Path) -> Iterator[Path]:
    """A copy of the good checkpoint with calibrated KV scales, to be broken."""
    with tempfile.TemporaryDirectory(dir=fast_folder) as home:
        yield Path(shutil.copytree(checkpoints["fp8_kv"], Path(home) / "checkpoint"))
