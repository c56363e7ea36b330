"""Rotation of drafters against transformers' own parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from m27quant.errors import CheckpointError
from m27quant.runtime.speculative.rope import read_rope

NVIDIA = {"rope_type": "yarn", "factor": 48.0, "original_max_position_embeddings": 4096, "beta_fast": 1, "beta_slow": 1,
          "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"rope_theta": 5e6},
    "linear": {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "nvidia's YaRN": {"rope_theta": 5e6, "rope_scaling": NVIDIA},
    "YaRN": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                                 "original_max_position_embeddings": 2048}},
    "YaRN, no truncation": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0,
                                                "original_max_position_embeddings": 2048, "truncate": False}},
    "YaRN, factor from lengths": {"rope_theta": 1e6, "max_position_embeddings": 8192, "rope_scaling": {
        "rope_type": "yarn", "factor": None, "original_max_position_embeddings": 2048, "mscale": 0.7,
        "mscale_all_dim": 0.4}},
    "YaRN, stated attention factor": {"rope_theta": 1e6, "rope_scaling": {
        "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048, "attention_factor": 1.25}},
    "transformers 5": {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}, "rope_theta": 5.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_tables_are_those_of_transformers(kind: dict[str, Any], head_dim: int) -> None:
    stated = dict(kind)
    theta = stated.pop("rope_theta", None)
    parameters = (
        stated.pop("rope_scaling", None) or stated.pop("rope_parameters", None) or {"rope_type": "default"}
    )
    parameters = {"rope_theta": theta} | parameters
    parameters["rope_type"] = parameters.pop("type", parameters.get("rope_type"))
    config = Qwen3Config(head_dim=head_dim, rope_parameters=parameters, **stated)
    oracle = Qwen3RotaryEmbedding(config)
    positions = torch.tensor([0, 1, 2, 77, 4095, 150_000])
    cos, sin = oracle(torch.zeros(1, 1, head_dim), positions[None])
    rope = read_rope(kind, head_dim)
    assert rope.stated
    for ours, theirs in zip(rope.table(positions, torch.float32), (cos, sin), strict=True):
        torch.testing.assert_close(ours[:, 0], theirs[0], atol=0, rtol=0)


def test_what_is_not_stated_is_transformers_default() -> None:
    rope = read_rope({}, 8)
    assert (rope.theta, rope.stated) == (10000.0, False)
    assert (read_rope({"rope_theta": 5e6}, 8, 123.0).theta, read_rope({}, 8, 9.0).stated) == (123.0, True)


@pytest.mark.parametrize(("stated", "words"), [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3' is not supported"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "original_max_position_embeddings is None"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "factor is x"),
    ({"rope_theta": -1}, "rope_theta is -1"),
    ({"rope_theta": True}, "rope_theta is True"),
    ({"rope_theta": 1}, "rope_theta is 1, expected more than 1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
])  # fmt: skip
def test_what_makes_no_rotation(stated: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as fault:
        read_rope(stated, 8)
    assert words in fault.value.message
