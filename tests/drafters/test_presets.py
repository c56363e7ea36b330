"""From options to a recipe: the published shapes, and no option without an effect or an error."""

from __future__ import annotations

from dataclasses import fields
from math import prod
from typing import Any

import pytest

from m27quant import TrainOptions
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.drafter_config import expected_tensors, parse_drafter
from m27quant.drafters.export import config_of
from m27quant.drafters.presets import Recipe, resolve
from m27quant.errors import UsageError
from m27quant.verify.collect import Findings

M27 = M2Config(
    hidden_size=3072, intermediate_size=1536, num_hidden_layers=62, num_attention_heads=48, num_key_value_heads=8,
    head_dim=128, rotary_dim=64, rope_theta=5e6, rms_norm_eps=1e-6, num_local_experts=256, num_experts_per_tok=8,
    vocab_size=200064, max_position_embeddings=196608, weight_block_size=(128, 128),
)  # fmt: skip


def recipe(kind: str, **options: Any) -> Recipe:
    return resolve(kind, TrainOptions(**options), M27)


def shapes(found: Recipe) -> dict[str, tuple[int, ...]]:
    """Of the tensors that verify expects beside the config that would be written."""
    config = parse_drafter(config_of(found.shape), Findings())
    assert config is not None
    return dict(expected_tensors(config, len(found.shape.hidden_states)))


@pytest.mark.parametrize(
    ("preset", "tensors", "millions"),
    # reference figures: MirecX' file of 36 tensors, 0.70 GiB; z-lab's L5 I8192 K5; SpecForge's head of 0.453 GiB
    [("l3h5", 36, 377.5), ("dflash-b8", 58, 550.5)],
)
def test_dflash_presets_have_the_published_sizes(preset: str, tensors: int, millions: float) -> None:
    found = recipe("dflash", preset=preset)
    shape = shapes(found)
    assert len(shape) == tensors == 11 * found.shape.num_hidden_layers + 3
    assert round(sum(map(prod, shape.values())) / 1e6, 1) == millions


def test_l3h5_is_l3h5() -> None:
    found = recipe("dflash", preset="l3h5")
    config = config_of(found.shape)
    assert config["dflash_config"] == {"mask_token_id": 200063, "target_layer_ids": [2, 16, 30, 43, 57]}
    assert (config["block_size"], config["num_hidden_layers"], config["rope_theta"]) == (16, 3, 5_000_000)
    assert shapes(found)["fc.weight"] == (3072, 15360)
    assert found.objective.loss_decay == 0.85
    assert f"{sum(map(prod, shapes(found).values())) * 2 / 2**30:.2f}" == "0.70"


def test_eagle3_32k_is_specforges_head() -> None:
    found = recipe("eagle3", preset="eagle3-32k")
    config = config_of(found.shape)
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 30, 58]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 31, 59]
    assert (config["draft_vocab_size"], config["rope_theta"]) == (32000, 5_000_000)
    assert (found.objective.num_steps, found.objective.loss_decay) == (7, 0.8)
    parameters = sum(map(prod, shapes(found).values())) + 32000 * 3072  # the head is listed apart
    assert round(parameters / 1e6, 1) == 243.0


def test_what_is_left_open_comes_from_the_target() -> None:
    shape = recipe("dflash").shape
    assert (shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim) == (24, 8, 128)
    assert shape.hidden_states == (2, 16, 31, 46, 60)
    assert (shape.mask_token_id, shape.intermediate_size, shape.rope_theta) == (200063, 9216, 5e6)
    assert recipe("eagle3").shape.hidden_states == (2, 31, 59)


CHANGES: dict[str, dict[str, Any]] = {
    "dflash": {
        "preset": "l3h5", "num_layers": 4, "taps": (1, 2), "block_size": 8, "train_block_sizes": (8, 16),
        "mask_token": 5, "intermediate_size": 64, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64,
        "rope_theta": 1e4, "anchors_per_seq": 5, "loss_decay": 0.5, "loss_gamma": 3.0, "loss": 0.5, "steps": 7,
        "epochs": 2.0, "batch_size": 3, "grad_accumulation": 2, "lr": 0.5, "optimizer": "muon", "weight_decay": 0.5,
        "warmup": 0.5, "schedule": "linear", "clip": 0.25, "dtype": "f32", "max_length": 99, "seed": 1,
    },
    "eagle3": {
        "preset": "eagle3-32k", "taps": (1, 2, 3), "intermediate_size": 64, "num_heads": 8, "num_kv_heads": 4,
        "head_dim": 64, "rope_theta": 1e4, "draft_vocab_size": 100, "loss_decay": 0.5, "num_steps": 3, "loss": 0.5,
        "steps": 7, "epochs": 2.0, "batch_size": 3, "grad_accumulation": 2, "lr": 0.5, "optimizer": "muon",
        "weight_decay": 0.5, "warmup": 0.5, "schedule": "linear", "clip": 0.25, "dtype": "f32", "max_length": 99,
        "seed": 1,
    },
}  # fmt: skip
ELSEWHERE = {
    "adam_lr", "heldout", "eval_every", "eval_samples", "save_every", "resume", "overwrite", "force_unlock",
    "activations", "kv_cache_dtype", "revision", "offline", "token", "device", "cache_size", "layout",
    "init_from",
}  # fmt: skip
"""Options of what is kept, measured and read, which other tests change."""


def test_no_option_is_forgotten_here() -> None:
    assert {f.name for f in fields(TrainOptions)} == {*CHANGES["dflash"], *CHANGES["eagle3"], *ELSEWHERE}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, changes in CHANGES.items() for name in changes]
)
def test_every_option_changes_the_recipe(kind: str, name: str) -> None:
    assert recipe(kind, **{name: CHANGES[kind][name]}).document() != recipe(kind).document()


@pytest.mark.parametrize("name", sorted(CHANGES["dflash"].keys() - CHANGES["eagle3"].keys()))
def test_dflashs_options_are_refused_by_eagle3(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is an option of dflash"):
        recipe("eagle3", **{name: CHANGES["dflash"][name]})


@pytest.mark.parametrize("name", sorted(CHANGES["eagle3"].keys() - CHANGES["dflash"].keys()))
def test_eagle3s_options_are_refused_by_dflash(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is an option of eagle3"):
        recipe("dflash", **{name: CHANGES["eagle3"][name]})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "l4"}, "no such preset"),
        ({"preset": "eagle3-32k"}, "is of eagle3"),
        ({"adam_lr": 0.1}, "adam_lr goes with the optimizer muon"),
        ({"taps": (5, 3)}, "not ascending"),
        ({"taps": (0, 3)}, "hidden states 1 to 61"),
        ({"taps": (3, 62)}, "hidden states 1 to 61"),
        ({"mask_token": 200064}, "no row of the target's embedding"),
        ({"num_heads": 10}, "cannot be divided"),
        ({"head_dim": 33}, "even"),
        ({"max_length": 200_000}, "more than the target's"),
        ({"train_block_sizes": (32,)}, "training block of 32"),
        ({"steps": 1, "epochs": 2.0}, "exclude each other"),
        ({"loss_decay": 0.5, "loss_gamma": 2.0}, "exclude each other"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"eval_every": 5}, "none is held out"),
        ({"optimizer": "sgd"}, "one of adamw, muon"),
        ({"loss": 1.5}, "at most 1"),
        ({"loss": float("nan")}, "at least 0"),
        ({"lr": float("inf")}, "finite"),
        ({"lr": 0.0}, "above 0"),
        ({"clip": -1.0}, "above 0"),
        ({"epochs": float("nan")}, "above 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        recipe("dflash", **options)


def test_a_presets_gamma_gives_way_to_a_decay() -> None:
    found = recipe("dflash", preset="dflash-b8", loss_decay=0.9)
    assert (found.objective.loss_decay, found.objective.loss_gamma) == (0.9, None)
    assert recipe("dflash", preset="dflash-b8").objective.loss_gamma == 4.0


def test_eagle3_reads_three_states() -> None:
    with pytest.raises(UsageError, match="three hidden states"):
        recipe("eagle3", taps=(1, 2))
