"""Runs that begin with another drafter: its sizes and weights, whatever layout it has; what cannot be begun with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import m27quant
from m27quant.drafters.start import read_start
from m27quant.errors import CheckpointError, UsageError
from tests.drafters.conftest import SMALL

Train = Callable[..., m27quant.TrainResult]
SHAPE = (
    "num_layers", "taps", "block_size", "mask_token", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
    "draft_vocab_size",
)  # fmt: skip
STILL = {"lr": 1e-30, "weight_decay": 0.0, "steps": 1}
"""Too slow a step to change a BF16 weight."""


@pytest.fixture
def train(target: Path, rows: Path, tmp_path: Path) -> Train:
    def run(kind: str, name: str, **changes: Any) -> m27quant.TrainResult:
        given = {"say": lambda line: None} | SMALL[kind] | changes
        if "init_from" in changes:
            given = {key: value for key, value in given.items() if key not in SHAPE} | changes
        return m27quant.train_drafter(kind, target, rows, tmp_path / name, **given)

    return run


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
@pytest.mark.parametrize("layout", ["plain", "speculators"])
def test_a_run_begins_where_another_ended(kind: str, layout: str, train: Train, tmp_path: Path) -> None:
    train(kind, "first", layout=layout)
    train(kind, "second", init_from=str(tmp_path / "first"), layout=layout, **STILL)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0] == configs[1]
    assert "| begun with | the weights of first |" in (tmp_path / "second/README.md").read_text()


def test_the_block_may_be_another_and_nothing_else(train: Train, tmp_path: Path) -> None:
    train("dflash", "first")
    train("dflash", "shorter", init_from=str(tmp_path / "first"), block_size=3, **STILL)
    assert json.loads((tmp_path / "shorter/config.json").read_text())["block_size"] == 3
    with pytest.raises(UsageError, match="num_layers 7: the drafter to begin with has"):
        train("dflash", "deeper", init_from=str(tmp_path / "first"), num_layers=7)
    with pytest.raises(UsageError, match="preset and init_from exclude each other"):
        train("dflash", "both", init_from=str(tmp_path / "first"), preset="l3h5")
    assert not (tmp_path / "deeper").exists()


def test_a_resumed_run_has_begun_with_the_same_weights(train: Train, tmp_path: Path) -> None:
    train("dflash", "first")
    train("dflash", "other", seed=1)
    begun = {"init_from": str(tmp_path / "first")}
    train("dflash", "second", **begun)
    assert train("dflash", "second", resume=True, **begun).was_complete
    with pytest.raises(UsageError, match="init_from"):
        train("dflash", "second", resume=True, init_from=str(tmp_path / "other"))


def test_what_cannot_be_begun_with(train: Train, target: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        train("dflash", "out", init_from=str(tmp_path / "nowhere"))
    train("eagle3", "head")
    with pytest.raises(CheckpointError, match="of kind eagle3, expected: dflash"):
        train("dflash", "out", init_from=str(tmp_path / "head"))
    train("dflash", "first")
    changed = shutil.copytree(tmp_path / "first", tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    for change, why in (
        ({"layer_types": ["sliding_attention"] * config["num_hidden_layers"], "sliding_window": 8}, "window"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
    ):
        (changed / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=why):
            train("dflash", "out", init_from=str(changed))
    assert not (tmp_path / "out").exists()


def test_a_published_kind_of_head_is_read_as_it_runs(repository: Path) -> None:
    """The drafters in examples/: sizes as config.json has them, weights as in the file."""
    from m27quant.checkpoint.hub import Location
    from m27quant.checkpoint.quantized import open_checkpoint

    with open_checkpoint(Location(repository / "examples/tiny-m27")) as source:
        config = source.config
    start = read_start(repository / "examples/tiny-m27-eagle3", "eagle3", config)
    file = load_file(repository / "examples/tiny-m27-eagle3/model.safetensors")
    assert start.tokens_W is not None
    assert torch.equal(start.tokens_W, file["d2t"] + torch.arange(len(file["d2t"])))
    assert torch.equal(
        start.weights["midlayer.mlp.up_proj.weight"], file["midlayer.mlp.up_proj.weight"].float()
    )
    assert start.weights.keys() == file.keys() - {"d2t", "t2d"}
