"""Is a source's set of tensors the one that its config.json promises?  Checked on headers, before any long work."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from m27quant.checkpoint import names
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.names import TensorSpec
from m27quant.checkpoint.source import Source
from m27quant.errors import CheckpointError, escape

SCALE_SUFFIX = "_scale_inv"
MAX_PROBLEMS = 100
PLAIN = ("BF16", "F32")
"""What a passed-through tensor may be; officially gate and bias are F32, the rest BF16."""

_IN_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.(.*)")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.[0-9]+\.w[123]\.weight(_scale_inv)?")
_DECODER_LAYER = {
    *(f"self_attn.{p}.weight{s}" for p in names.ATTENTION_PROJECTIONS for s in ("", SCALE_SUFFIX)),
    *(
        f"{n}.weight"
        for n in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    ),
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.e_score_correction_bias",
}


def check_layout(source: Source) -> list[str]:
    """Compare headers with config.json; returns notices on tensors that will be left out.

    Raises:
        CheckpointError: the first mismatches of missing, mistyped or misshapen tensors.
    """
    problems: list[str] = []
    expected: set[str] = set()
    for name, dtypes, shape in plain_tensors(source.config):
        expected.add(name)
        problems += tensor_problem(source, name, dtypes, shape)
        stop_early(problems)
    for module, shape in _linears(source.config):
        weight = f"{module}.weight"
        expected |= {weight, weight + SCALE_SUFFIX}
        problems += _linear_problem(source, module, weight, shape)
        stop_early(problems)
    raise_for(problems)
    unknown = sorted(set(source.tensors) - expected)
    _refuse_unclaimed(source, unknown)
    if not unknown:
        return []
    kind = "multi-token-prediction" if any(".layers." in n for n in unknown) else "unknown"
    return [
        f"{len(unknown)} {kind} tensors are not part of the model and are left out ('{escape(unknown[0])}' ...)"
    ]


def stop_early(problems: list[str]) -> None:
    """A config.json that promises a million tensors costs no more than one that promises a hundred."""
    if len(problems) > MAX_PROBLEMS:
        raise_for(problems)


def _refuse_unclaimed(source: Source, unknown: list[str]) -> None:
    """Decoder layers or experts beyond those that config.json counts mean that it does not fit.

    Layers behind the last one that hold anything but a decoder layer's tensors are multi-token prediction.
    """
    c = source.config
    layers: dict[int, list[str]] = {}
    for name in unknown:
        if (match := _IN_LAYER.fullmatch(name)) is None:
            continue
        layer, rest = int(match[1]), match[2]
        if layer >= c.num_hidden_layers:
            layers.setdefault(layer, []).append(rest)
        elif _EXPERT.fullmatch(rest):
            raise_for([f"'{name}' is an expert beyond num_local_experts {c.num_local_experts}"])
    for layer, rests in sorted(layers.items()):
        if all(_EXPERT.fullmatch(r) or r in _DECODER_LAYER for r in rests):
            raise_for(
                [f"layer {layer} is there, but config.json says num_hidden_layers {c.num_hidden_layers}"]
            )


def plain_tensors(c: M2Config) -> Iterable[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Tensors that are passed through: (name, allowed dtypes, shape)."""
    table = (c.vocab_size, c.hidden_size)
    yield names.EMBEDDING, PLAIN, table
    yield names.LM_HEAD, PLAIN, table
    yield names.FINAL_NORM, PLAIN, (c.hidden_size,)
    for layer in range(c.num_hidden_layers):
        for name, shape in names.norm_shapes(c, layer).items():
            yield name, PLAIN, shape
        yield names.gate(layer), PLAIN, (c.num_local_experts, c.hidden_size)
        yield names.correction_bias(layer), PLAIN, (c.num_local_experts,)


def official_tensors(c: M2Config) -> Iterable[TensorSpec]:
    """Every tensor of the official checkpoint with these sizes: block-scaled FP8, or BF16 where the config says so."""
    for name, _, shape in plain_tensors(c):
        router = name.endswith((".gate.weight", ".e_score_correction_bias"))
        yield TensorSpec(name, "F32" if router else "BF16", shape)
    for module, shape in _linears(c):
        yield TensorSpec(f"{module}.weight", "F8_E4M3" if c.weight_block_size else "BF16", shape)
        if c.weight_block_size:
            yield TensorSpec(f"{module}.weight{SCALE_SUFFIX}", "F32", _blocks(shape, c.weight_block_size))


def _blocks(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _linears(c: M2Config) -> Iterable[tuple[str, tuple[int, int]]]:
    """Linears that are FP8 in the official checkpoint: (module, [out, in])."""
    attention, experts = names.attention_shapes(c), names.expert_shapes(c)
    for layer in range(c.num_hidden_layers):
        for projection, shape in attention.items():
            yield f"{names.attention(layer)}.{projection}", shape
        for index in range(c.num_local_experts):
            for projection, shape in experts.items():
                yield names.expert(layer, index, projection), shape


def tensor_problem(source: Source, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """What is wrong with a tensor by its header: nothing, or one line."""
    info = source.tensors.get(name)
    if info is None:
        return [f"'{name}' is missing{_in_memory_name(source, name)}"]
    if info.shape != shape:
        return [f"'{name}' has shape {list(info.shape)}, config.json implies {list(shape)}"]
    if info.dtype not in dtypes:
        return [f"'{name}' is {info.dtype}, expected {' or '.join(dtypes)}"]
    return []


def _linear_problem(source: Source, module: str, weight: str, shape: tuple[int, int]) -> list[str]:
    block = source.config.weight_block_size
    if block is None:
        problems = tensor_problem(source, weight, ("BF16",), shape)
        if weight + SCALE_SUFFIX in source.tensors or (problems and "F8_E4M3" in problems[0]):
            return [
                f"'{weight}' is block-scaled FP8, but config.json has no quantization_config that says so"
            ]
        return problems
    info = source.tensors.get(weight)
    if (
        info is not None
        and info.dtype == "BF16"
        and _is_exempt(source, module)
        and weight + SCALE_SUFFIX not in source.tensors
    ):
        return tensor_problem(source, weight, ("BF16",), shape)
    problems = tensor_problem(source, weight, ("F8_E4M3",), shape)
    blocks = _blocks(shape, block)
    return problems or tensor_problem(source, weight + SCALE_SUFFIX, ("F32",), blocks)


def _is_exempt(source: Source, module: str) -> bool:
    """True where config.json's modules_to_not_convert names the module."""
    patterns = source.raw_config["quantization_config"].get("modules_to_not_convert") or []
    return any(isinstance(p, str) and (p in module or fnmatch.fnmatchcase(module, p)) for p in patterns)


def _in_memory_name(source: Source, name: str) -> str:
    renamed = name.replace(".block_sparse_moe.", ".mlp.")
    if renamed != name and (renamed in source.tensors or any(".mlp.experts." in n for n in source.tensors)):
        return " (the checkpoint carries transformers' in-memory names, `mlp` for `block_sparse_moe`)"
    return ""


def raise_for(problems: list[str]) -> None:
    """Raise `CheckpointError` with the first few problems, if there are any."""
    if not problems:
        return
    shown = "; ".join(escape(p, 400) for p in problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise CheckpointError(
        f"the tensors do not fit config.json: {shown}{more}",
        hint="download the missing or damaged shards again, or correct config.json",
    )
