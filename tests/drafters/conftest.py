"""A small random target and what it is said to have written, to train small drafters on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Shape, write_checkpoint
from tests.threads import one_thread as one_thread

TARGET = Shape(
    hidden_size=48, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, rotary_dim=8, num_local_experts=4, vocab_size=64,
)  # fmt: skip
SIZES: dict[str, Any] = {"intermediate_size": 24, "batch_size": 2, "steps": 6}
SMALL: dict[str, dict[str, Any]] = {
    "dflash": SIZES | {"num_layers": 2, "block_size": 4, "anchors_per_seq": 4, "taps": (1, 3)},
    "eagle3": SIZES | {"draft_vocab_size": 40, "num_steps": 2, "taps": (1, 3, 5)},
}
"""Options of a drafter that trains in a moment."""


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Prompts and answers of random lengths."""
    chance = random.Random(seed)
    rows = [
        {
            "prompt_token_ids": chance.choices(range(60), k=chance.randint(3, 9)),
            "token_ids": chance.choices(range(60), k=chance.randint(6, 14)),
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("target") / "model", TARGET)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 10)


@pytest.fixture(scope="session")
def random_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BF16 model with a vocabulary of 256; to be read only."""
    folder = tmp_path_factory.mktemp("random-target")
    return write_checkpoint(folder, Shape(num_hidden_layers=4), fp8=False)
