"""config.json of MiniMax-M2.x, checked: what it is, its sizes, how its weights are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m27quant.checkpoint.strict_json import DAMAGED, read_object
from m27quant.errors import CheckpointError, escape

MODEL_TYPE = "minimax_m2"
ARCHITECTURE = "MiniMaxM2ForCausalLM"
OTHER_MODEL = "start from the official checkpoint, or a fine-tune that keeps its architecture"
PLAIN_SOURCE = "start from the official FP8 checkpoint or a BF16 fine-tune of it"
GROUP_SIZE = 16
"""NVFP4's block along the input features."""


@dataclass(frozen=True, slots=True)
class M2Config:
    """The fields of config.json that the model is computed from (names as there)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rms_norm_eps: float
    num_local_experts: int
    num_experts_per_tok: int
    vocab_size: int
    max_position_embeddings: int
    weight_block_size: tuple[int, int] | None
    """Rows and columns of an FP8 block; None where the checkpoint is BF16."""

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


def read_config(folder: Path) -> tuple[M2Config, dict[str, Any]]:
    """Read and check config.json; returns the checked fields and the whole object as it stands."""
    path = folder / "config.json"
    raw = read_object(path)
    return parse_config(raw, escape(path)), raw


def parse_config(raw: dict[str, Any], where: str = "config.json") -> M2Config:
    """Check a config.json object.

    Raises:
        CheckpointError: not MiniMax-M2.x, a field that is missing or out of bounds, a variant that
            this program would compute wrongly, or weights that are already quantized.
    """
    _refuse_other_models(raw, where)
    rotary_dim, rope_theta = _rotary(raw, where)
    config = M2Config(
        hidden_size=_integer(raw, "hidden_size", where, 2**20),
        intermediate_size=_integer(raw, "intermediate_size", where, 2**20),
        num_hidden_layers=_integer(raw, "num_hidden_layers", where, 4096),
        num_attention_heads=_integer(raw, "num_attention_heads", where, 4096),
        num_key_value_heads=_integer(raw, "num_key_value_heads", where, 4096),
        head_dim=_integer(raw, "head_dim", where, 4096),
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
        rms_norm_eps=_number(raw, "rms_norm_eps", where, default=1e-6),
        num_local_experts=_integer(raw, "num_local_experts", where, 16384),
        num_experts_per_tok=_integer(raw, "num_experts_per_tok", where, 16384),
        vocab_size=_integer(raw, "vocab_size", where, 2**24),
        max_position_embeddings=_integer(raw, "max_position_embeddings", where, 2**31),
        weight_block_size=_weight_block_size(raw, where),
    )
    _check_consistency(config, where)
    return config


def _refuse_other_models(raw: dict[str, Any], where: str) -> None:
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if model_type != MODEL_TYPE:
        raise CheckpointError(
            f"{where}: model_type is '{escape(model_type)}'; supported is '{MODEL_TYPE}' (MiniMax-M2.x)",
            hint=OTHER_MODEL,
        )
    if architectures is not None and architectures != [ARCHITECTURE]:
        raise CheckpointError(
            f"{where}: architectures is {escape(architectures)}; only ['{ARCHITECTURE}'] is supported",
            hint=OTHER_MODEL,
        )
    expected: dict[str, tuple[Any, ...]] = {
        "scoring_func": (None, "sigmoid"),
        "use_qk_norm": (None, True),
        "qk_norm_type": (None, "per_layer"),
        "use_routing_bias": (None, True),
        "hidden_act": (None, "silu"),
        "tie_word_embeddings": (None, False),
        "shared_intermediate_size": (None, 0),
        "sliding_window": (None,),
        "rope_scaling": (None,),
    }
    for key, allowed in expected.items():
        value = raw.get(key)
        if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
            raise CheckpointError(
                f"{where}: {key} = {escape(value)} is not a MiniMax-M2.x that this version computes",
                hint=OTHER_MODEL,
            )
    kinds = raw.get("attn_type_list")
    if kinds is not None and (not isinstance(kinds, list) or any(k != 1 for k in kinds)):
        raise CheckpointError(
            f"{where}: attn_type_list names attention other than full attention (1)", hint=OTHER_MODEL
        )


def _integer(raw: dict[str, Any], key: str, where: str, largest: int) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        found = "is missing" if key not in raw else f"is {escape(value)}"
        raise CheckpointError(
            f"{where}: {key} {found}; expected an integer from 1 to {largest}", hint=DAMAGED
        )
    return value


def _number(raw: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < 1e30
        or not math.isfinite(value)
    ):
        found = "is missing" if value is None else f"is {escape(value)}"
        raise CheckpointError(f"{where}: {key} {found}; expected a positive number", hint=DAMAGED)
    return float(value)


def _rotary(raw: dict[str, Any], where: str) -> tuple[int, float]:
    """(rotary_dim, rope_theta) from the official fields or from transformers 5's `rope_parameters`."""
    rope = raw.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"{where}: rope_type '{escape(rope['rope_type'])}' is not supported", hint=OTHER_MODEL
        )
    theta = _number(raw if "rope_theta" in raw else rope, "rope_theta", where)
    if "rotary_dim" in raw:
        return _integer(raw, "rotary_dim", where, 4096), theta
    factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if factor is None:
        raise CheckpointError(
            f"{where}: neither rotary_dim nor partial_rotary_factor says how much of a head is rotated",
            hint='MiniMax-M2.x rotates half: add "rotary_dim": 64 (head_dim 128) as the official config.json has it',
        )
    head_dim = _integer(raw, "head_dim", where, 4096)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise CheckpointError(
            f"{where}: partial_rotary_factor is {escape(factor)}; expected 0 to 1", hint=DAMAGED
        )
    return int(head_dim * factor), theta


def _weight_block_size(raw: dict[str, Any], where: str) -> tuple[int, int] | None:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{where}: quantization_config is not an object", hint=DAMAGED)
    method = quantization.get("quant_method")
    if method != "fp8":
        algorithm = quantization.get("quant_algo")
        kind = f"{escape(method)} {escape(algorithm)}" if algorithm else escape(method)
        raise CheckpointError(
            f"{where}: this checkpoint is already quantized ({kind})",
            hint=PLAIN_SOURCE,
        )
    if quantization.get("fmt", "float8_e4m3fn") not in ("float8_e4m3fn", "e4m3"):
        raise CheckpointError(
            f"{where}: FP8 format '{escape(quantization.get('fmt'))}'; only E4M3 is supported",
            hint=PLAIN_SOURCE,
        )
    exempt = quantization.get("modules_to_not_convert")
    if exempt is not None and (not isinstance(exempt, list) or not all(isinstance(m, str) for m in exempt)):
        raise CheckpointError(
            f"{where}: quantization_config.modules_to_not_convert is not a list of module names", hint=DAMAGED
        )
    block = quantization.get("weight_block_size")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= 65536 for n in block)
    ):
        raise CheckpointError(
            f"{where}: quantization_config.weight_block_size is {escape(block)}; expected [128, 128]",
            hint="only block-scaled FP8 is supported, not per-tensor or per-channel",
        )
    return block[0], block[1]


def _check_consistency(c: M2Config, where: str) -> None:
    if c.num_experts_per_tok > c.num_local_experts:
        raise CheckpointError(
            f"{where}: num_experts_per_tok {c.num_experts_per_tok} > num_local_experts {c.num_local_experts}",
            hint=DAMAGED,
        )
    if c.num_attention_heads % c.num_key_value_heads:
        raise CheckpointError(
            f"{where}: {c.num_attention_heads} query heads do not divide among {c.num_key_value_heads} key/value heads",
            hint=DAMAGED,
        )
    if c.rotary_dim % 2 or not 2 <= c.rotary_dim <= c.head_dim:
        raise CheckpointError(
            f"{where}: rotary_dim {c.rotary_dim} must be even, from 2 to head_dim {c.head_dim}", hint=DAMAGED
        )
    for key in ("hidden_size", "intermediate_size"):
        if getattr(c, key) % GROUP_SIZE:
            raise CheckpointError(
                f"{where}: {key} {getattr(c, key)} is not a multiple of {GROUP_SIZE}: no NVFP4 form",
                hint="start from a checkpoint whose sizes are multiples of 16",
            )
