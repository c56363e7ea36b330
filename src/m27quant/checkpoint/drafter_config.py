"""config.json of a drafter: DFlash or EAGLE3, in the layouts of z-lab, SpecForge, modelopt and speculators.

Faults are told to whoever asks, by the code under which `verify` explains them: it collects them, the runtime stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from m27quant.errors import escape

Kind = Literal["dflash", "eagle3"]
DFLASH, EAGLE3 = "dflash_config", "eagle_config"
TOP_TAPS = "eagle_aux_hidden_state_layer_ids"
MAX_SIZE, MAX_TAPS = 2**24, 64
VARIANTS = {
    "dflash2": "DFlash2",
    "dspark": "DSpark",
    "lilicorr": "LiLiCorr",
    "domino": "Domino",
    "peagle": "P-EAGLE",
    "medusa": "Medusa",
    "mlpspeculator": "MLP speculator",
    "nextn": "multi-token prediction",
    "mtp": "multi-token prediction",
}
"""What an architecture's or kind's name holds -> the relative that it is."""
LAYER_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {
        "hidden_size": 4096, "intermediate_size": 22016, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    },
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32,
        "vocab_size": 32000, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
"""transformers' defaults of what is stored in `transformer_layer_config`."""
DFLASH2_KEYS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


class Faults(Protocol):
    """Where faults are told; `add` may raise."""

    def add(self, code: str, message: str, /, *, expected: object = None, found: object = None) -> None:
        """One fault: a message to show as it is, and both values where there are two."""

    def codes(self) -> set[str]:
        """Of all that were told."""


@dataclass(frozen=True, slots=True)
class Taps:
    """Which hidden states of the target a drafter sees; 0 is the embedding, N the last layer's output."""

    ids: tuple[int, ...]
    """As config.json has them."""
    captured: tuple[int, ...]
    """The numbers of hidden states that they mean."""
    convention: str


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """The checked fields."""

    kind: Kind
    layout: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    raw: dict[str, Any]

    def section(self) -> dict[str, Any]:
        """The part of config.json that is this kind's own."""
        return table(self.raw, DFLASH if self.kind == "dflash" else EAGLE3)


def table(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """An object within an object; empty where it is absent or something else."""
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def parse_drafter(raw: dict[str, Any], found: Faults) -> DrafterConfig | None:
    """What the config describes; None, with a finding, where it is another kind or not usable."""
    if (variant := _variant(raw)) is not None:
        found.add("M27-R003", f"drafter: {variant} is not supported", found=variant)
        return None
    kind = _kind(raw)
    if kind is None:
        what = f"architectures {escape(raw.get('architectures'))}, model_type {escape(raw.get('model_type'))}"
        found.add("M27-R002", f"drafter: neither DFlash nor EAGLE3 ({what})", found=raw.get("architectures"))
        return None
    layout = "speculators" if "speculators_model_type" in raw else "flat"
    sizes = layer_table(raw)
    numbers = {}
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        numbers[key] = _size(sizes, key, found)
    optional = {
        "num_key_value_heads": (sizes, numbers["num_attention_heads"]),
        "num_hidden_layers": (sizes, 1 if kind == "eagle3" else None),
        "head_dim": (sizes, _divided(numbers["hidden_size"], numbers["num_attention_heads"])),
        "draft_vocab_size": (raw, numbers["vocab_size"]),
        "target_hidden_size": (raw, numbers["hidden_size"]),
    }
    for key, (place, default) in optional.items():
        numbers[key] = default if place.get(key) is None and default else _size(place, key, found)
    if "M27-R004" in found.codes():
        return None
    if kind == "eagle3" and numbers["num_hidden_layers"] != 1:
        found.add("M27-R003", f"drafter: EAGLE3 of {numbers['num_hidden_layers']} layers is not supported")
        return None
    return DrafterConfig(kind=kind, layout=layout, raw=raw, **numbers)


def layer_table(raw: dict[str, Any]) -> dict[str, Any]:
    """The object that holds the layers' sizes; speculators' own leaves out what transformers has as default."""
    if "speculators_model_type" not in raw:
        return raw
    stated = table(raw, "transformer_layer_config")
    model_type = stated.get("model_type")
    return (LAYER_DEFAULTS.get(model_type, {}) if isinstance(model_type, str) else {}) | stated


def _divided(number: int, by: int) -> int | None:
    return number // by if number and by else None


def _size(place: dict[str, Any], key: str, found: Faults, least: int = 1) -> int:
    value = place.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_SIZE:
        return value
    shown = "missing" if key not in place else escape(value)
    found.add(
        "M27-R004", f"drafter: {key} in config.json is {shown}",
        expected=f"{least} to {MAX_SIZE}", found=shown,
    )  # fmt: skip
    return 0


def _names(raw: dict[str, Any]) -> list[str]:
    """What the config calls itself."""
    architectures = raw.get("architectures")
    listed = architectures if isinstance(architectures, list) else [architectures]
    return [n.lower() for n in (*listed, raw.get("speculators_model_type")) if isinstance(n, str)]


def _variant(raw: dict[str, Any]) -> str | None:
    names, dflash, eagle = _names(raw), table(raw, DFLASH), table(raw, EAGLE3)
    for part, variant in VARIANTS.items():
        if any(part in name.replace("-", "").replace("_", "") for name in names):
            return variant
    if any(dflash.get(key) is not None for key in DFLASH2_KEYS):
        return "DFlash2"
    if isinstance(projector := dflash.get("projector_type"), str) and projector.lower() in VARIANTS:
        return VARIANTS[projector.lower()]
    if True in (raw.get("sample_from_anchor"), dflash.get("sample_from_anchor")):
        return "DFlash with sample_from_anchor"
    if True in (raw.get("parallel_drafting"), eagle.get("parallel_drafting")):
        return "P-EAGLE (parallel_drafting)"
    if False in (dflash.get("use_aux_hidden_state"), eagle.get("use_aux_hidden_state")):
        return "a drafter without taps (use_aux_hidden_state false)"
    if any("eagle" in name and "eagle3" not in name for name in names):
        return "EAGLE before version 3"
    return None


def _kind(raw: dict[str, Any]) -> Kind | None:
    names = _names(raw)
    if any("dflash" in name for name in names):
        return "dflash"
    if any("eagle3" in name for name in names):
        return "eagle3"
    return None


# -- taps ------------------------------------------------------------------------------------------


def default_taps(layers: int) -> tuple[int, int, int]:
    """The hidden states that engines take for an EAGLE3 drafter that states none."""
    return 2, layers // 2, layers - 3


def read_taps(c: DrafterConfig, layers: int, found: Faults) -> Taps | None:
    """The taps and how they are counted, by the layout's convention; None where they are not usable."""
    nested_key = "target_layer_ids" if c.kind == "dflash" else TOP_TAPS
    if c.layout == "speculators":
        key = "aux_hidden_state_layer_ids" if c.kind == "dflash" else TOP_TAPS
        stated, nested, top = c.raw.get(key), None, c.raw.get(key)
    else:
        nested, top = c.section().get(nested_key), c.raw.get(TOP_TAPS)
        stated = nested if nested is not None else top
    if stated is None:
        return _no_taps(c, layers, found)
    lists = [ids for ids in (nested, top) if ids is not None]
    for ids in lists:
        if not isinstance(ids, list) or not 1 <= len(ids) <= MAX_TAPS or not all(map(_is_count, ids)):
            found.add("M27-R016", f"drafter: taps {escape(ids)} are no list of layers", found=ids)
            return None
    captured = tuple(stated)
    convention = "hidden states"
    if nested is not None and not (c.kind == "eagle3" and tuple(nested) == default_taps(layers)):
        captured, convention = tuple(n + 1 for n in nested), "layers, each plus one"
    if nested is not None and top is not None and tuple(top) != captured:
        found.add(
            "M27-R020", f"drafter: the nested taps {escape(nested)} mean hidden states {list(captured)}, "
            f"the top-level ones are {escape(top)}", expected=list(captured), found=top,
        )  # fmt: skip
    _check_taps(captured, layers, found)
    if c.kind == "eagle3" and c.layout == "flat":
        _check_eagle(nested, top, captured, layers, found)
    return Taps(tuple(stated), captured, convention)


def _no_taps(c: DrafterConfig, layers: int, found: Faults) -> Taps | None:
    if c.kind == "dflash":
        found.add("M27-R015", "drafter: config.json states no target_layer_ids")
        return None
    taps = default_taps(layers)
    found.add("M27-R023", f"drafter: no taps are stated; engines take hidden states {list(taps)}")
    if layers < 6:
        return None
    return Taps((), taps, "the engines' defaults")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_taps(captured: tuple[int, ...], layers: int, found: Faults) -> None:
    shown = list(captured)
    if wrong := [n for n in captured if not 0 <= n <= layers]:
        found.add(
            "M27-R016", f"drafter: hidden state {escape(wrong[0])} of a target of {layers} layers",
            expected=f"0 to {layers}", found=wrong[0],
        )  # fmt: skip
    elif layers in captured:
        found.add("M27-R017", f"drafter: hidden state {layers} is the last layer's output", found=layers)
    if shown != sorted(set(captured)):
        found.add(
            "M27-R019", f"drafter: taps {escape(shown)} are not ascending", expected=sorted(set(shown)), found=shown
        )  # fmt: skip


def _check_eagle(nested: Any, top: Any, captured: tuple[int, ...], layers: int, found: Faults) -> None:
    """What the engines make of the place in which an EAGLE3 config states its taps."""
    shown = list(captured)
    if nested is None:
        taken = list(default_taps(layers))
        if shown != taken:
            found.add("M27-R022", f"drafter: SGLang ignores the top-level taps {shown} and takes {taken}")
    elif nested == shown:
        later = [n + 1 for n in shown]
        found.add(
            "M27-R022", f"drafter: the nested taps {shown} look like hidden states; SGLang takes {later}"
        )
    elif top is None:
        found.add("M27-R021", f"drafter: vLLM takes hidden states {nested} instead of {shown}")


# -- tensors ---------------------------------------------------------------------------------------


def expected_tensors(c: DrafterConfig, num_taps: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a drafter must have."""
    d, hd, i = c.hidden_size, c.head_dim, c.intermediate_size
    q, kv = c.num_attention_heads * hd, c.num_key_value_heads * hd
    width = d if c.kind == "dflash" else 2 * d
    yield "fc.weight", (d, num_taps * c.target_hidden_size)
    yield "norm.weight", (d,)
    if c.kind == "dflash":
        yield "hidden_norm.weight", (d,)
    else:
        yield "layers.0.hidden_norm.weight", (d,)
    for layer in range(c.num_hidden_layers):
        p = f"layers.{layer}."
        yield p + "input_layernorm.weight", (d,)
        yield p + "post_attention_layernorm.weight", (d,)
        for name, shape in (("q", (q, width)), ("k", (kv, width)), ("v", (kv, width)), ("o", (d, q))):
            yield f"{p}self_attn.{name}_proj.weight", shape
        if c.kind == "dflash":
            yield p + "self_attn.q_norm.weight", (hd,)
            yield p + "self_attn.k_norm.weight", (hd,)
        for name, shape in (("gate", (i, d)), ("up", (i, d)), ("down", (d, i))):
            yield f"{p}mlp.{name}_proj.weight", shape
