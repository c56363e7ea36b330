"""What a drafter computes, from its config.json: the sizes that both kinds share, and the settings of each.

Whatever would make the mathematics another one than that of the plain kinds is refused by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from m27quant.checkpoint.drafter_config import DrafterConfig, layer_table, table
from m27quant.errors import CheckpointError, escape
from m27quant.runtime.speculative.rope import Rope, read_rope

HINT = "take config.json from where the weights come from"
SLIDING, FULL = "sliding_attention", "full_attention"
MAX_BLOCK, MAX_WINDOW = 1024, 2**31


@dataclass(frozen=True, slots=True)
class Sizes:
    """Named as in config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one DFlash layer lets a slot see, beside itself."""

    window: int | None
    """How far back; None: all positions before the anchor."""
    causal: bool
    """Of the slots of its own block only those before it."""
    from_anchor: bool
    """The window ends at the anchor for every slot (speculators), or else at the slot itself (all others)."""


@dataclass(frozen=True, slots=True)
class DFlashSettings:
    """Of a DFlash drafter."""

    sizes: Sizes
    block_size: int
    mask_token_id: int
    attention: tuple[LayerAttention, ...]


@dataclass(frozen=True, slots=True)
class Eagle3Settings:
    """Of an EAGLE3 head."""

    sizes: Sizes
    norm_before_residual: bool
    """The residual branch starts at the normed hidden state."""
    norm_output: bool
    """The next draft step reads the hidden state after the final norm."""
    fc_norm: bool
    """Each tap has a norm of its own."""
    input_norm: bool
    """All taps together have one norm."""
    logit_scale: float


def read_sizes(c: DrafterConfig, rope_theta: float | None) -> Sizes:
    """Sizes and rotation.

    Raises:
        CheckpointError: what is not supported, or numbers that do not fit each other.
    """
    raw = layer_table(c.raw)
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": (None, "silu"),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "is_neox_style": (None, True),
        "add_swa_attention_sink_bias": (None, False),
    }
    for key, values in allowed.items():
        if raw.get(key) not in values:
            _refuse(key, raw.get(key), values[-1])
    if c.num_attention_heads % c.num_key_value_heads:
        _refuse("num_key_value_heads", c.num_key_value_heads, f"a divisor of {c.num_attention_heads} heads")
    eps = raw.get("rms_norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        _refuse("rms_norm_eps", eps, "0 to 1")
    return Sizes(
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        rms_norm_eps=float(eps),
        rope=read_rope(raw, c.head_dim, rope_theta),
    )


def read_dflash(c: DrafterConfig, vocab_size: int, rope_theta: float | None = None) -> DFlashSettings:
    """Settings of a DFlash drafter for a target of `vocab_size` tokens; raises `CheckpointError`."""
    section = c.section()
    for key, neutral in (("attention_sink_bias", False), ("attention_value_scale", 1.0)):
        value = section.get(key)
        if value is not None and (
            value != neutral or isinstance(value, bool) is not isinstance(neutral, bool)
        ):
            _refuse(f"dflash_config.{key}", value, neutral)
    block, mask = (section.get(key, c.raw.get(key)) for key in ("block_size", "mask_token_id"))
    block = _integer("block_size", block, 2, MAX_BLOCK)
    mask = _integer("mask_token_id", mask, 0, vocab_size - 1)
    attention = tuple(_layer_attention(c, n) for n in range(c.num_hidden_layers))
    return DFlashSettings(read_sizes(c, rope_theta), block, mask, attention)


def _layer_attention(c: DrafterConfig, layer: int) -> LayerAttention:
    """Window and causality of one layer, by the rules of vLLM for flat configs, of speculators for its own."""
    raw, section = layer_table(c.raw), c.section()
    types = raw.get("layer_types")
    if types is not None:
        known = isinstance(types, list) and all(t in (SLIDING, FULL) for t in types)
        if not known or len(types) != c.num_hidden_layers:
            _refuse("layer_types", types, f"{c.num_hidden_layers} of {FULL} and {SLIDING}")
    use_swa = section.get("use_swa", False)
    everywhere = use_swa is True and SLIDING not in (types or ())
    sliding = everywhere or (types is not None and types[layer] == SLIDING)
    window = None
    if sliding:
        window = section.get("swa_window_size", raw.get("sliding_window"))
        window = _integer("sliding_window", window, 1, MAX_WINDOW, f", as layer {layer} is {SLIDING}")
    if c.layout == "speculators":
        causal = sliding and c.raw.get("sliding_window_non_causal") is not True
        return LayerAttention(window, causal, from_anchor=True)
    stated = [v for v in (raw.get("is_causal"), section.get("causal")) if v is not None]
    if any(not isinstance(v, bool) for v in stated):
        _refuse("causal", stated[0], "true or false")
    causal = stated[0] if stated else types is not None and types[layer] == SLIDING
    return LayerAttention(window, causal, from_anchor=False)


def read_eagle3(
    c: DrafterConfig, tensors: set[str], renamed: bool, rope_theta: float | None = None
) -> Eagle3Settings:
    """Settings of an EAGLE3 head that has these tensors (plain names); raises `CheckpointError`.

    `renamed`: the file calls its layer `midlayer` (SafeAILab, SpecForge).  There `norm_output` says that the head reads
    the normed hidden state, which it always does; elsewhere it says that the next draft step does too.
    """
    raw, section = c.raw, table(c.raw, "eagle_config")
    if SLIDING in (layer_table(c.raw).get("layer_types") or ()):
        _refuse("layer_types", SLIDING, FULL)
    has = {
        "input_norm": "input_norm.weight" in tensors,
        "fc_norm": any(n.startswith("fc_norm.") for n in tensors),
    }
    for key, name in (("norm_before_fc", "input_norm"), ("fc_norm", "fc_norm")):
        if _flag(raw, section, key) and not has[name]:
            raise CheckpointError(f"drafter: {key} is true, tensor '{name}' is missing", hint=HINT)
    scale = raw.get("logit_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e6:
        _refuse("logit_scale", scale, "a positive number")
    return Eagle3Settings(
        sizes=read_sizes(c, rope_theta),
        norm_before_residual=_flag(raw, section, "norm_before_residual"),
        norm_output=_flag(raw, section, "norm_output") and not renamed,
        fc_norm=has["fc_norm"],
        input_norm=has["input_norm"],
        logit_scale=float(scale),
    )


def _flag(raw: dict[str, Any], section: dict[str, Any], key: str) -> bool:
    value = raw.get(key, section.get(key, False))
    if value is None:
        return False
    if not isinstance(value, bool):
        _refuse(key, value, "true or false")
    return bool(value)


def _integer(key: str, value: object, least: int, most: int, why: str = "") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        _refuse(key, value, f"{least} to {most}{why}")
    return value


def _refuse(key: str, found: object, expected: object) -> NoReturn:
    raise CheckpointError(f"drafter: {key} is {escape(found)}, expected: {escape(expected)}", hint=HINT)
