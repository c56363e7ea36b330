"""config.json: M2.x is read, everything else is refused by name, nothing else is raised."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.errors import CheckpointError, M27Error
from tests.checkpoint.common import check_fault, outcome
from tests.checkpoints import Shape

M27 = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attn_type_list": [1] * 62,
    "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"},
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 204800,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}


def test_the_official_config() -> None:
    config = parse_config(M27)
    assert dataclasses.asdict(config) == {
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "rope_theta": 5e6,
        "rms_norm_eps": 1e-6,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "vocab_size": 200064,
        "max_position_embeddings": 204800,
        "weight_block_size": (128, 128),
    }
    assert (config.q_size, config.kv_size) == (6144, 1024)


def changed(**fields: Any) -> dict[str, Any]:
    return {k: v for k, v in (copy.deepcopy(M27) | fields).items() if v is not ...}


def test_bf16_and_pruned_variants() -> None:
    assert parse_config(changed(quantization_config=...)).weight_block_size is None
    assert parse_config(changed(num_local_experts=192)).num_local_experts == 192
    assert parse_config(Shape().config()).hidden_size == 144


def test_rotation_as_transformers_5_writes_it() -> None:
    rope = {"rope_theta": 5000000, "rope_type": "default", "partial_rotary_factor": 0.5}
    config = parse_config(changed(rope_theta=..., rotary_dim=..., rope_parameters=rope))
    assert (config.rotary_dim, config.rope_theta) == (64, 5e6)
    with pytest.raises(CheckpointError, match="neither rotary_dim nor partial_rotary_factor"):
        parse_config(changed(rotary_dim=...))
    with pytest.raises(CheckpointError, match="rope_type 'yarn'"):
        parse_config(changed(rope_parameters={"rope_type": "yarn"}))
    for factor in (0, -1, 2, True, "0.5", 1e-9):
        with pytest.raises(CheckpointError, match="rotary"):
            parse_config(changed(rotary_dim=..., rope_parameters=rope | {"partial_rotary_factor": factor}))


JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 16, 127, 128, 2**31, 2**64, 10**4000])
    | st.floats(allow_nan=True)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def check(raw: dict[str, Any]) -> None:
    """Our error, with a next step, or a config that can be computed."""
    config = outcome(lambda: parse_config(raw))
    if isinstance(config, M27Error):
        assert isinstance(config, CheckpointError)
        assert config.message.startswith("config.json: ")
        check_fault(config)
        return
    assert isinstance(config, M2Config)
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert 2 <= config.rotary_dim <= config.head_dim
    assert config.rotary_dim % 2 == 0
    assert 1 <= config.num_experts_per_tok <= config.num_local_experts
    assert 0 < config.rope_theta < float("inf")
    assert config.hidden_size % 16 == config.intermediate_size % 16 == 0


@given(
    st.dictionaries(
        st.sampled_from([*M27, "rope_parameters", "rope_scaling", "sliding_window"]), JUNK, max_size=4
    )
)
def test_any_fields(fields: dict[str, Any]) -> None:
    check(copy.deepcopy(M27) | fields)


@given(st.dictionaries(st.sampled_from(list(M27["quantization_config"])), JUNK, max_size=3))  # type: ignore[call-overload]
def test_any_quantization(fields: dict[str, Any]) -> None:
    check(changed(quantization_config=M27["quantization_config"] | fields))  # type: ignore[operator]


@given(st.sets(st.sampled_from(list(M27))))
def test_any_missing_fields(names: set[str]) -> None:
    check({k: v for k, v in M27.items() if k not in names})


@given(st.dictionaries(st.text(max_size=10), JUNK, max_size=3))
def test_any_object(raw: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        parse_config(raw)
