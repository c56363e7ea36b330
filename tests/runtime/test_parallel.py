"""Two ranks over Gloo: each holds half of the heads and experts, and both say what one says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from m27quant.checkpoint.config import parse_config
from m27quant.errors import UsageError
from m27quant.runtime.parallel import Ranks
from tests.checkpoints import Shape, write_checkpoint
from tests.runtime.ranks import answers
from tests.tolerance import LOGIT_ATOL, SQNR_OTHER_ORDER_DB, sqnr_db


def two_ranks(repository: Path, out: Path, checkpoint: Path, dtype: str) -> list[dict[str, Any]]:
    """What each of them said."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(repository / "tests/runtime/ranks.py")
    command = [*launcher, script, str(checkpoint), str(out), dtype]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_two_ranks_say_what_one_says(kind: str, tiny_nvfp4: Path, repository: Path, tmp_path: Path) -> None:
    checkpoint = tiny_nvfp4 if kind == "nvfp4" else write_checkpoint(tmp_path / "fp8", Shape(vocab_size=256))
    alone = answers(str(checkpoint), "float32")
    first, second = two_ranks(repository, tmp_path / "two", checkpoint, "float32")
    assert first["greedy"] == second["greedy"] == alone["greedy"]
    assert first["drawn"] == second["drawn"] == alone["drawn"]
    assert torch.equal(first["logits"], second["logits"]), "or their choices would part one day"
    if kind == "fp8":
        assert 0 < float((first["logits"] - alone["logits"]).abs().max()) <= LOGIT_ATOL
    else:  # its FP8 cache may round a last bit elsewhere
        assert sqnr_db(alone["logits"], first["logits"]) > SQNR_OTHER_ORDER_DB
    assert first["heads"] == alone["heads"] // 2
    assert first["weights"] == second["weights"] < 0.75 * alone["weights"]


def test_heads_that_cannot_be_divided_are_refused() -> None:
    config = parse_config(Shape().config())
    Ranks(0, 2).check(config)
    with pytest.raises(UsageError, match="num_key_value_heads 2 cannot be divided among 4"):
        Ranks(0, 4).check(config)


def test_every_rank_has_its_part() -> None:
    assert [list(range(12))[Ranks(r, 3).part(12)] for r in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
