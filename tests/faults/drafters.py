"""Single faults of drafters: a change to config and tensors of a good one, and the check that must find it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import drafter_files as d
from tests.drafter_files import Tensors

Edit = Callable[[dict[str, Any], Tensors], None]


@dataclass(frozen=True)
class Fault:
    """How a good drafter is broken."""

    good: Callable[[], tuple[dict[str, Any], Tensors]]
    edit: Edit
    code: str
    words: str
    files: Callable[[Path], object] = lambda folder: None
    """What is done to the written folder."""
    quick: bool = True
    """Whether headers and configs are enough to see it."""


def field(*path: str, value: Any) -> Edit:
    def edit(config: dict[str, Any], tensors: Tensors) -> None:
        place = config
        for key in path[:-1]:
            place = place[key]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return edit


def tensor(name: str, value: tuple[str, list[int], bytes] | None) -> Edit:
    def edit(config: dict[str, Any], tensors: Tensors) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return edit


def also(*edits: Edit) -> Edit:
    def edit(config: dict[str, Any], tensors: Tensors) -> None:
        for one in edits:
            one(config, tensors)

    return edit


def nothing(config: dict[str, Any], tensors: Tensors) -> None:
    """The files are changed instead."""


def wide(config: dict[str, Any], tensors: Tensors) -> None:
    """Of another model: every width is 64."""
    config["hidden_size"] = 64


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def linked_away(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to("../elsewhere.json")


TAPS = ("dflash_config", "target_layer_ids")
NESTED = ("eagle_config", "eagle_aux_hidden_state_layer_ids")
TOP = "eagle_aux_hidden_state_layer_ids"
TWICE = [3, 3, *d.KNOWN[2:]]
PAST = [*d.KNOWN[:-1], d.VOCAB]
IDS = ("I64", [d.DRAFT_VOCAB], struct.pack(f"<{d.DRAFT_VOCAB}q", *d.KNOWN))

FAULTS = {
    "config missing": Fault(
        d.dflash, nothing, "M27-R001", "config.json", lambda f: (f / "config.json").unlink()
    ),
    "config a list": Fault(
        d.dflash, nothing, "M27-R001", "JSON object", lambda f: (f / "config.json").write_text("[]")
    ),
    "config a link that leaves": Fault(d.dflash, nothing, "M27-R001", "leaves the folder", linked_away),
    "weights missing": Fault(
        d.dflash, nothing, "M27-R001", "no weights", lambda f: (f / "model.safetensors").unlink()
    ),
    "weights truncated": Fault(
        d.eagle3, nothing, "M27-R001", "truncated",
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
    ),
    "weights pickled": Fault(d.eagle3, nothing, "M27-R001", "pickled", pickled),
    "index that leaves": Fault(
        d.eagle3, nothing, "M27-R001", "would leave the folder",
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}'),
    ),
    "one tensor under two names": Fault(
        d.eagle3, tensor("model.norm.weight", d.zeros("BF16", d.HIDDEN)), "M27-R001", "norm.weight"
    ),
    "a plain model": Fault(
        d.dflash, field("architectures", value=["Qwen3ForCausalLM"]), "M27-R002", "Qwen3ForCausalLM"
    ),
    "DFlash2": Fault(d.dflash, field("architectures", value=["DFlash2DraftModel"]), "M27-R003", "DFlash2"),
    "DFlash2 by its keys": Fault(
        d.dflash, field("dflash_config", "selector_rank", value=8), "M27-R003", "DFlash2"
    ),
    "Domino": Fault(d.dflash, field("dflash_config", "projector_type", value="domino"), "M27-R003", "Domino"),
    "DSpark": Fault(d.dflash, field("architectures", value=["DSparkDraftModel"]), "M27-R003", "DSpark"),
    "sample_from_anchor": Fault(
        d.dflash_speculators, field("sample_from_anchor", value=True), "M27-R003", "sample_from_anchor"
    ),
    "P-EAGLE": Fault(d.eagle3, tensor("mask_hidden", d.zeros("BF16", d.HIDDEN)), "M27-R003", "P-EAGLE"),
    "parallel drafting": Fault(d.eagle3, field("parallel_drafting", value=True), "M27-R003", "P-EAGLE"),
    "EAGLE 2": Fault(d.eagle3, field("architectures", value=["LlamaForCausalLMEagle"]), "M27-R003", "EAGLE before"),
    "EAGLE3 of two layers": Fault(d.eagle3, field("num_hidden_layers", value=2), "M27-R003", "2 layers"),
    "no hidden_size": Fault(d.dflash, field("hidden_size", value=...), "M27-R004", "hidden_size"),
    "heads a string": Fault(d.eagle3, field("num_attention_heads", value="2"), "M27-R004", "num_attention_heads"),
    "no block size": Fault(d.dflash, field("block_size", value=...), "M27-R004", "block_size"),
    "a norm missing": Fault(d.dflash, tensor("hidden_norm.weight", None), "M27-R005", "hidden_norm.weight"),
    "fc missing": Fault(d.eagle3, tensor("fc.weight", None), "M27-R005", "fc.weight"),
    "a stranger": Fault(d.dflash, tensor("layers.0.mystery", d.zeros("F32", 2)), "M27-R006", "mystery"),
    "q too narrow": Fault(
        d.eagle3, tensor("midlayer.self_attn.q_proj.weight", d.zeros("BF16", 32, d.HIDDEN)), "M27-R007", "q_proj"
    ),
    "head of the full vocabulary beside d2t": Fault(
        d.eagle3, tensor("lm_head.weight", d.zeros("BF16", d.VOCAB, d.HIDDEN)), "M27-R007", "lm_head.weight"
    ),
    "codes for weights": Fault(
        d.dflash, tensor("layers.0.mlp.up_proj.weight", d.zeros("U8", d.ROWS, d.HIDDEN)), "M27-R008", "up_proj"
    ),
    "another hidden size": Fault(d.dflash, wide, "M27-R009", "64"),
    "another target": Fault(d.eagle3, field("target_hidden_size", value=96), "M27-R009", "target_hidden_size"),
    "a larger vocabulary": Fault(d.dflash, field("vocab_size", value=4096), "M27-R010", "4,096"),
    "an embedding too short": Fault(
        d.eagle3, tensor("embed_tokens.weight", d.zeros("BF16", d.DRAFT_VOCAB, d.HIDDEN)), "M27-R010", "256 rows"
    ),
    "no d2t": Fault(d.eagle3, also(tensor("d2t", None), tensor("t2d", None)), "M27-R011", "no d2t"),
    "d2t of floats": Fault(d.eagle3, tensor("d2t", d.zeros("F32", d.DRAFT_VOCAB)), "M27-R012", "d2t"),
    "t2d of bytes": Fault(d.eagle3, tensor("t2d", d.zeros("U8", d.VOCAB)), "M27-R012", "t2d"),
    "t2d too short": Fault(d.eagle3, tensor("t2d", d.zeros("BOOL", d.DRAFT_VOCAB)), "M27-R012", "t2d"),
    "d2t holds ids": Fault(d.eagle3, tensor("d2t", IDS), "M27-R013", "looks like ids", quick=False),
    "d2t past the end": Fault(d.eagle3, tensor("d2t", d.offsets(PAST)), "M27-R013", "2048", quick=False),
    "d2t twice the same": Fault(d.eagle3, tensor("d2t", d.offsets(TWICE)), "M27-R013", "another row", quick=False),
    "t2d of another": Fault(d.eagle3, tensor("t2d", d.marks(d.KNOWN[1:])), "M27-R014", "first 3", quick=False),
    "no taps": Fault(d.dflash, field(*TAPS, value=...), "M27-R015", "target_layer_ids"),
    "a tap beyond the target": Fault(d.dflash, field(*TAPS, value=[1, 4, 12]), "M27-R016", "13"),
    "a negative tap": Fault(d.dflash, field(*TAPS, value=[-5, 4, 8]), "M27-R016", "-4"),
    "taps of text": Fault(d.dflash, field(*TAPS, value="1,4,8"), "M27-R016", "1,4,8"),
    "a tap behind the last layer": Fault(d.dflash, field(*TAPS, value=[1, 4, 11]), "M27-R017", "12"),
    "a tap too few": Fault(d.dflash, field(*TAPS, value=[1, 4]), "M27-R018", "3 hidden states"),
    "taps unsorted": Fault(d.dflash, field(*TAPS, value=[4, 1, 8]), "M27-R019", "[5, 2, 9]"),
    "two lists": Fault(d.eagle3, field(TOP, value=[1, 5, 8]), "M27-R020", "[2, 6, 9]"),
    "nested taps alone": Fault(d.eagle3, field(TOP, value=...), "M27-R021", "vLLM takes"),
    "top-level taps alone": Fault(
        d.eagle3, also(field("eagle_config", value=...), field(TOP, value=[3, 6, 9])), "M27-R022", "SGLang ignores"
    ),
    "nested hidden states": Fault(d.eagle3, field(*NESTED, value=[2, 6, 9]), "M27-R022", "[3, 7, 10]"),
    "EAGLE3 without taps": Fault(
        d.eagle3, also(field("eagle_config", value=...), field(TOP, value=...)), "M27-R023", "[2, 6, 9]"
    ),
    "no mask token": Fault(d.dflash, field("dflash_config", "mask_token_id", value=...), "M27-R024", "None"),
    "a mask beyond": Fault(d.dflash, field("dflash_config", "mask_token_id", value=2048), "M27-R024", "2048"),
    "no head": Fault(d.eagle3, tensor("lm_head.weight", None), "M27-R025", "lm_head.weight"),
    "its own embedding": Fault(
        d.dflash, tensor("embed_tokens.weight", d.zeros("BF16", d.VOCAB, d.HIDDEN)), "M27-R026", "embed_tokens"
    ),
    "quantization inherited": Fault(
        d.dflash, field("quantization_config", value={"quant_method": "modelopt"}), "M27-R027", "modelopt"
    ),
    "SGLang quantizes": Fault(d.eagle3, nothing, "M27-R028", "unquant"),
    "SGLang without DFlash": Fault(d.dflash, nothing, "M27-R029", "0.5.23"),
    "no rope_theta": Fault(d.eagle3, field("rope_theta", value=...), "M27-R030", "rope_theta"),
}  # fmt: skip
