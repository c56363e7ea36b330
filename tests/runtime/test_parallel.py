"""Two ranks over Gloo: each holds half of the heads and experts, and both say what one says."""

from __future__ import annotations

import json
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
from tests.tolerance import LOGIT_ATOL, SQNR_OTHER_ORDER_DB, sqnr_db


def run(repository: Path, out: Path, num_ranks: int, checkpoint: Path, *more: str) -> list[dict[str, Any]]:
    """What each rank said; `logits` among it."""
    script = str(repository / "tests/runtime/ranks.py")
    start = [sys.executable, script]
    if num_ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start = [*launcher, "--nproc-per-node", str(num_ranks), script]
    done = subprocess.run(
        [*start, str(checkpoint), str(out), *more], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = ["alone"] if num_ranks == 1 else [str(n) for n in range(num_ranks)]
    found = [json.loads(Path(f"{out}-{name}.json").read_text()) for name in names]
    for result, name in zip(found, names, strict=True):
        result["logits"] = torch.load(f"{out}-{name}.pt")
    return found


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_two_ranks_say_what_one_says(kind: str, tiny_nvfp4: Path, repository: Path, tmp_path: Path) -> None:
    checkpoint = tiny_nvfp4 if kind == "nvfp4" else write_checkpoint(tmp_path / "fp8", Shape(vocab_size=256))
    (alone,) = run(repository, tmp_path / "one", 1, checkpoint, "float32")
    first, second = run(repository, tmp_path / "two", 2, checkpoint, "float32", "ngram")
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
