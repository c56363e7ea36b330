"""A drafter beside its target: sizes, vocabulary, taps and tensors, as the engines would take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.drafter_config import (
    DrafterConfig,
    Taps,
    expected_tensors,
    parse_drafter,
    read_taps,
    table,
)
from m27quant.checkpoint.drafter_weights import read_headers
from m27quant.checkpoint.header import TensorInfo
from m27quant.checkpoint.source import check_link_stays_inside
from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import CheckpointError, escape
from m27quant.verify.collect import Findings
from m27quant.verify.drafter_vocabulary import check_vocabulary, wrong_shape

CONFIG = "config.json"
FLOATS = ("BF16", "F16", "F32")
OPTIONAL = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d", "input_norm.weight")
MAX_LAYERS = 256


def check_drafter(folder: Path, target: M2Config, found: Findings, *, values: bool = True) -> dict[str, Any]:
    """Check the drafter in `folder` against its target's sizes; returns what it is.

    With `values` the tables d2t and t2d are read too; nothing else of the weights is.

    Raises:
        CheckpointError: no such folder.
        EnvironmentFault: a file that exists and cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{escape(folder)}: no such folder", hint="name the drafter's folder")
    raw = _read_config(folder, found)
    tensors = _read_tensors(folder, found)
    if raw is None or tensors is None:
        return {}
    if "mask_hidden" in tensors:
        found.add("M27-R003", "drafter: P-EAGLE (it has a tensor 'mask_hidden') is not supported")
        return {}
    c = parse_drafter(raw, found)
    if c is None:
        return {}
    _check_quantization(c, tensors, found)
    taps = read_taps(c, target.num_hidden_layers, found)
    same_width = _check_target(c, target, tensors, found)
    if c.num_hidden_layers > MAX_LAYERS:
        found.add("M27-R004", f"drafter: {c.num_hidden_layers:,} layers", found=c.num_hidden_layers)
        return {}
    if same_width:
        _check_shapes(c, taps, tensors, found)
    check_vocabulary(c, target, tensors, found, values=values)
    block_size, mask = _check_dflash(c, target, found)
    _check_rope(c, found)
    found.add("M27-R028", "drafter: SGLang needs --speculative-draft-model-quantization unquant")
    facts = {
        "kind": c.kind,
        "layout": c.layout,
        "taps": None if taps is None else list(taps.ids),
        "hidden_states": None if taps is None else list(taps.captured),
        "taps_count": None if taps is None else taps.convention,
        "layers": c.num_hidden_layers,
        "draft_vocab_size": c.draft_vocab_size,
        "block_size": block_size,
        "mask_token_id": mask,
        "tensor_bytes": sum(info.nbytes for info in tensors.values()),
    }
    return {key: value for key, value in facts.items() if value is not None}


# -- files -----------------------------------------------------------------------------------------


def _read_config(folder: Path, found: Findings) -> dict[str, Any] | None:
    try:
        check_link_stays_inside(folder, folder / CONFIG)
        return read_object(folder / CONFIG)
    except CheckpointError as fault:
        found.add("M27-R001", f"drafter: {fault.message}")
        return None


def _read_tensors(folder: Path, found: Findings) -> dict[str, TensorInfo] | None:
    """All tensors by the names that the layouts share."""
    try:
        return read_headers(folder)
    except CheckpointError as fault:
        found.add("M27-R001", f"drafter: {fault.message}")
        return None


# -- sizes and tensors -----------------------------------------------------------------------------


def _check_quantization(c: DrafterConfig, tensors: dict[str, TensorInfo], found: Findings) -> None:
    codes = [n for n, info in tensors.items() if n not in ("d2t", "t2d") and info.dtype not in FLOATS]
    for name in codes:
        found.add(
            "M27-R008", f"drafter: '{escape(name)}' is {tensors[name].dtype}",
            expected="BF16", found=tensors[name].dtype,
        )  # fmt: skip
    if not codes and (c.raw.get("quantization_config") or c.raw.get("compression_config")):
        method = table(c.raw, "quantization_config").get("quant_method")
        found.add(
            "M27-R027", f"drafter: config.json says it is quantized ({escape(method)}), its weights are not",
            expected="no quantization_config", found=method,
        )  # fmt: skip


def _check_target(
    c: DrafterConfig, target: M2Config, tensors: dict[str, TensorInfo], found: Findings
) -> bool:
    """Widths: the target's hidden states come in, and its embedding and head are shared."""
    shares = c.kind == "dflash" or "embed_tokens.weight" not in tensors
    named = {"target_hidden_size": c.target_hidden_size} | ({"hidden_size": c.hidden_size} if shares else {})
    for key, size in named.items():
        if size != target.hidden_size:
            found.add(
                "M27-R009", f"drafter: {key} is {size:,}, the target's hidden_size {target.hidden_size:,}",
                expected=target.hidden_size, found=size,
            )  # fmt: skip
            return False
    return True


def _check_shapes(
    c: DrafterConfig, taps: Taps | None, tensors: dict[str, TensorInfo], found: Findings
) -> None:
    fc = tensors.get("fc.weight")
    width = fc.shape[1] if fc is not None and len(fc.shape) == 2 else 0
    fed = width // c.target_hidden_size if width % c.target_hidden_size == 0 else 0
    stated = len(taps.captured) if taps is not None else fed or 3
    if fed and fed != stated:
        found.add(
            "M27-R018", f"drafter: fc takes {fed} hidden states, config.json names {stated}",
            expected=fed, found=stated,
        )  # fmt: skip
    expected = dict(expected_tensors(c, fed or stated))
    for name, shape in expected.items():
        info = tensors.get(name)
        if info is None:
            found.add("M27-R005", f"drafter: '{name}' is missing", expected=list(shape))
        elif info.shape != shape:
            wrong_shape(info, name, shape, found)
    for name in tensors.keys() - expected.keys():
        if (
            name not in OPTIONAL
            and not name.startswith("fc_norm.")
            and not name.endswith("rotary_emb.inv_freq")
        ):
            found.add("M27-R006", f"drafter: '{escape(name)}' is not a tensor of {c.kind}", found=name)


# -- settings --------------------------------------------------------------------------------------


def _check_dflash(c: DrafterConfig, target: M2Config, found: Findings) -> tuple[int | None, int | None]:
    """Block size and mask token of a DFlash drafter."""
    if c.kind != "dflash":
        return None, None
    found.add("M27-R029", "drafter: SGLang 0.5.23 refuses DFlash for MiniMax-M2")
    block = _setting(c, "block_size")
    if block is None or not 2 <= block <= 1024:
        found.add("M27-R004", f"drafter: block_size is {escape(block)}", expected="2 to 1024", found=block)
    mask = _setting(c, "mask_token_id")
    if mask is None or not 0 <= mask < target.vocab_size:
        found.add(
            "M27-R024", f"drafter: mask_token_id is {escape(mask)}, the target has {target.vocab_size:,} tokens",
            expected=f"0 to {target.vocab_size - 1}", found=mask,
        )  # fmt: skip
    return block, mask


def _setting(c: DrafterConfig, key: str) -> int | None:
    """From dflash_config, else from the top; None where it is no integer."""
    value = c.section().get(key, c.raw.get(key))
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _check_rope(c: DrafterConfig, found: Findings) -> None:
    places = [c.raw, table(c.raw, "transformer_layer_config")]
    places += [table(place, "rope_parameters") for place in places]
    if not any(place.get("rope_theta") is not None for place in places):
        found.add("M27-R030", "drafter: config.json states no rope_theta", expected="rope_theta")
