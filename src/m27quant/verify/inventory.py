"""Names: exactly the tensors that config.json implies, under their official names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from m27quant.checkpoint import names
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.names import TensorSpec
from m27quant.errors import escape
from m27quant.verify.collect import Findings, place
from m27quant.verify.renames import recognize_renames
from m27quant.verify.view import View

MAX_TENSORS = 1_000_000
"""Five times M2.7: what a config.json beyond it promises is not spelt out."""

_IN_MEMORY = re.compile(
    r"\.mlp\.(experts|gate|e_score)|experts\.(gate_up_proj|down_proj)|\.(gate|up|down)_proj\."
)
_CALIBRATION = re.compile(r"_amax$|_quantizer(\.|$)|\._amax|pre_quant_scale")
_ENGINE_KV = re.compile(r"self_attn\.attn\.[kv]_scale$")
_COMPRESSED = re.compile(r"\.(weight_packed|weight_global_scale|input_global_scale)$")
_EXPERT_PART = re.compile(r"\.experts\.[0-9]+\.w[123]\.(weight|input_scale)$")


def check_inventory(view: View, found: Findings) -> None:
    """Compare the names with those that the config implies; fills `view.expected` and corrects `view.config`."""
    if view.config is None:
        return
    view.config = _settle_sizes(view, view.config, found)
    if _count(view.config) > MAX_TENSORS:
        found.add("M27-F002", f"config.json implies {_count(view.config):,} tensors", file="config.json")
        view.config = None
        return
    _recognize_formats(view, found)
    view.expected = {spec.name: spec for spec in expected_tensors(view.config)}
    strange = [n for n in view.tensors if n not in view.expected and unknown_kind(n) is None]
    told = set() if view.excused else recognize_renames(view, strange, found)
    _check_missing(view, told, found)
    _check_kv_scales(view, told, found)
    _check_unknown(view, told, found)


def expected_tensors(c: M2Config) -> Iterator[TensorSpec]:
    """Every tensor of an experts-only NVFP4 checkpoint with these sizes, KV scales included."""
    table = (c.vocab_size, c.hidden_size)
    yield TensorSpec(names.EMBEDDING, "BF16", table)
    yield TensorSpec(names.LM_HEAD, "BF16", table)
    yield TensorSpec(names.FINAL_NORM, "BF16", (c.hidden_size,))
    attention, experts = names.attention_shapes(c), names.expert_shapes(c)
    for layer in range(c.num_hidden_layers):
        for name, norm in names.norm_shapes(c, layer).items():
            yield TensorSpec(name, "BF16", norm)
        yield TensorSpec(names.gate(layer), "F32", (c.num_local_experts, c.hidden_size))
        yield TensorSpec(names.correction_bias(layer), "F32", (c.num_local_experts,))
        for projection, shape in attention.items():
            yield TensorSpec(f"{names.attention(layer)}.{projection}.weight", "BF16", shape)
        yield TensorSpec(names.k_scale(layer), "F32", ())
        yield TensorSpec(names.v_scale(layer), "F32", ())
        for expert in range(c.num_local_experts):
            for projection, shape in experts.items():
                yield from names.nvfp4_specs(names.expert(layer, expert, projection), shape)


def _count(c: M2Config) -> int:
    return c.num_hidden_layers * (12 + 12 * c.num_local_experts) + 3


# -- config.json against the tensors ---------------------------------------------------------------


def _settle_sizes(view: View, c: M2Config, found: Findings) -> M2Config:
    """Report sizes on which the tensors agree with each other and not with config.json; go on with theirs."""
    for key, ours, theirs in _sizes(view, c):
        if theirs is None or theirs == ours:
            continue
        found.add(
            "M27-T010", f"config.json says {key} {ours}, the tensors have {theirs}",
            file="config.json", expected=ours, found=theirs,
        )  # fmt: skip
        if key == "num_attention_heads * head_dim":
            c = replace(c, num_attention_heads=max(1, theirs // c.head_dim))
        elif key == "num_key_value_heads * head_dim":
            c = replace(c, num_key_value_heads=max(1, theirs // c.head_dim))
        else:
            c = replace(c, **{key: theirs})  # type: ignore[arg-type]  # all these fields are int
    return c


def _sizes(view: View, c: M2Config) -> Iterator[tuple[str, int, int | None]]:
    """(field, config.json's value, the tensors' value or None where they do not agree)."""
    layers = {
        layer
        for n in view.tensors
        if n.endswith(".input_layernorm.weight") and (layer := place(n)[0]) is not None
    }
    layers |= {
        layer
        for n in view.lost
        if n.endswith(".input_layernorm.weight") and (layer := place(n)[0]) is not None
    }
    whole = layers and layers == set(range(len(layers)))
    yield "num_hidden_layers", c.num_hidden_layers, len(layers) if whole else None
    in_layers = [names.layer_prefix(layer) for layer in sorted(layers)]
    gates = _common(view, (f"{p}.block_sparse_moe.gate.weight" for p in in_layers), 0)
    biases = _common(view, (f"{p}.block_sparse_moe.e_score_correction_bias" for p in in_layers), 0)
    yield "num_local_experts", c.num_local_experts, gates if gates == biases else None
    yield "hidden_size", c.hidden_size, _common(view, (f"{p}.input_layernorm.weight" for p in in_layers), 0)
    up = (f"{p}.block_sparse_moe.experts.{e}.w1.weight" for p in in_layers for e in (0, 1))
    yield "intermediate_size", c.intermediate_size, _common(view, up, 0)
    yield "vocab_size", c.vocab_size, _common(view, (names.EMBEDDING, names.LM_HEAD), 0)
    q, kv = (_common(view, (f"{p}.self_attn.{n}_norm.weight" for p in in_layers), 0) for n in "qk")
    yield "num_attention_heads * head_dim", c.q_size, q
    yield "num_key_value_heads * head_dim", c.kv_size, kv


def _common(view: View, tensors: Iterable[str], side: int) -> int | None:
    """The side that more than half of these tensors have, if they are more than one."""
    sides = Counter(
        info.shape[side] for name in tensors if (info := view.tensors.get(name)) and len(info.shape) > side
    )
    total = sum(sides.values())
    value, count = sides.most_common(1)[0] if sides else (0, 0)
    return value if total > 1 and 2 * count > total and value > 0 else None


# -- formats that are wrong as a whole -------------------------------------------------------------


def _recognize_formats(view: View, found: Findings) -> None:
    """Checkpoints of another format are reported once, by what they are."""
    kinds: Counter[str] = Counter()
    input_scales, example = 0, ""
    for name, info in view.tensors.items():
        if (match := _EXPERT_PART.search(name)) is None:
            continue
        if match[1] == "weight":
            kinds[info.dtype] += 1
            example = example or name
        else:
            input_scales += 1
    total = sum(kinds.values())
    if not total:
        return
    if 2 * kinds["U8"] < total:
        dtype = kinds.most_common(1)[0][0]
        found.add(
            "M27-T012", f"'{escape(example)}' is {dtype}: of {total:,} expert weights {kinds['U8']:,} are packed",
            tensor=example, expected="U8", found=dtype,
        )  # fmt: skip
        view.excused |= {".weight", ".weight_scale", ".weight_scale_2", ".input_scale"}
    elif not input_scales and not any(name.endswith(".input_scale") for name in view.lost):
        found.add(
            "M27-T013", f"none of the {total:,} packed expert weights has an input_scale ('{escape(example)}' ...)",
            tensor=example, expected=total, found=0,
        )  # fmt: skip
        view.excused.add(".input_scale")


def _is_excused(view: View, name: str) -> bool:
    return bool(view.excused) and ".experts." in name and name[name.rindex(".") :] in view.excused


# -- names -----------------------------------------------------------------------------------------


def _check_missing(view: View, told: set[str], found: Findings) -> None:
    absent = [
        n
        for n in view.expected
        if n not in view.tensors
        and n not in view.lost
        and n not in told
        and not n.endswith(("k_scale", "v_scale"))
    ]
    if not absent:
        return
    in_memory = any(".mlp.experts." in n or n.endswith(".experts.gate_up_proj") for n in view.tensors)
    packed = any(n.endswith(".weight_packed") for n in view.tensors)
    for name in absent:
        expert = ".block_sparse_moe." in name
        if _is_excused(view, name) or (expert and (in_memory or (packed and ".experts." in name))):
            continue  # reported as names of another kind
        code = "M27-T001" if ".experts." in name else "M27-T002"
        found.add(
            code, f"'{name}' is missing", tensor=name, expected=_spec(view.expected[name]), found="nothing"
        )


def _spec(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _check_kv_scales(view: View, told: set[str], found: Findings) -> None:
    assert view.config is not None
    layers = range(view.config.num_hidden_layers)
    there = {
        name
        for layer in layers
        for name in (names.k_scale(layer), names.v_scale(layer))
        if name in view.tensors
    }
    promised = {n for n in view.lost | told if n.endswith((".k_scale", ".v_scale"))}
    if not there and not promised:
        renamed = any(_ENGINE_KV.search(name) for name in view.tensors)
        if view.recipe_kv == "fp8" and not renamed:
            found.add(
                "M27-T003", "quantization_report.json tells of calibrated KV scales, but none is stored",
                tensor=names.k_scale(0), expected="F32 []", found="nothing",
            )  # fmt: skip
        elif view.kv_declared and not renamed:
            found.add(
                "M27-S017", "an FP8 cache is declared and no k_scale or v_scale is stored: engines use 1.0"
            )
        return
    for layer in layers:
        pair = (names.k_scale(layer), names.v_scale(layer))
        absent = [name for name in pair if name not in there and name not in promised]
        if len(absent) == 2:
            found.add(
                "M27-T003", f"layer {layer} has neither k_scale nor v_scale; other layers have", tensor=absent[0],
                expected="F32 []", found="nothing",
            )  # fmt: skip
        elif absent:
            (other,) = set(pair) - set(absent)
            found.add(
                "M27-T004", f"'{absent[0]}' is missing, '{other}' is there", tensor=absent[0],
                expected="F32 []", found="nothing",
            )  # fmt: skip
    if not view.kv_declared:
        found.add(
            "M27-F015", f"{len(there):,} KV scales are stored, but no kv_cache_scheme asks for an FP8 cache",
            file="config.json", expected="kv_cache_scheme", found="none",
        )  # fmt: skip


def _check_unknown(view: View, told: set[str], found: Findings) -> None:
    assert view.config is not None
    for name in view.tensors:
        if name in view.expected or name in told or view.is_fp8_attention(name):
            continue
        code, what = _kind(name, view.config)
        worst = float(".experts." in name)
        found.add(
            code, f"'{escape(name)}' {what}", tensor=name, found=view.tensors[name].dtype, badness=worst
        )


def _kind(name: str, c: M2Config) -> tuple[str, str]:
    layer, expert, _ = place(name)
    kind = unknown_kind(name)
    if kind is not None and kind[0] in ("M27-T006", "M27-T008"):
        return kind
    if layer is not None and layer >= c.num_hidden_layers:
        return "M27-T007", f"belongs to a layer behind the {c.num_hidden_layers} of config.json"
    if kind is not None:
        return kind
    if expert is not None and expert >= c.num_local_experts:
        return "M27-T009", f"belongs to an expert beyond the {c.num_local_experts} of config.json"
    return "M27-T009", "is not a tensor of MiniMax-M2"


def unknown_kind(name: str) -> tuple[str, str] | None:
    """(code, what it is) of a name that some tool is known to write; None for any other."""
    if _CALIBRATION.search(name):
        return "M27-T006", "is state of a calibration, not of a checkpoint"
    if _ENGINE_KV.search(name):
        return "M27-T008", "is an engine's name; checkpoints say k_proj.k_scale and v_proj.v_scale"
    if name.endswith("_scale_inv"):
        return "M27-T011", "is a block scale of the FP8 original"
    if _COMPRESSED.search(name):
        return "M27-T014", "is a name of compressed-tensors"
    if _IN_MEMORY.search(name):
        return "M27-T005", "is transformers' name in memory, not the official one"
    return None
