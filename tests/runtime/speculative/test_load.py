"""Which drafter it is, whether it fits: every layout loads, every relative and misfit is refused by name and values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from m27quant.errors import CheckpointError, UsageError
from m27quant.runtime.speculative.load import DrafterOptions, LoadedDrafter, load_drafter
from tests.runtime.speculative import makers as m

EMBED, HEAD = m.target_weights()
Made = tuple[dict[str, Any], m.Tensors]


def load(folder: Path, made: Made, **options: Any) -> LoadedDrafter:
    m.write(folder, *made)
    return load_drafter(folder, m.TARGET, EMBED, HEAD, DrafterOptions(**options), dtype=torch.float32)


def renamed(made: Made, old: str, new: str) -> Made:
    return made[0], {name.replace(old, new): tensor for name, tensor in made[1].items()}


def aux_norms(made: Made) -> Made:
    g = torch.Generator().manual_seed(0)
    places = ("low", "mid", "high")
    return made[0] | {"fc_norm": True}, made[1] | {f"aux_norm_{p}.weight": m.norm(g, m.D) for p in places}


LAYOUTS: dict[str, tuple[Callable[[], Made], tuple[int, ...]]] = {
    "DFlash": (m.dflash, (2, 5, 9)),
    "DFlash, prefixed": (lambda: (m.dflash()[0], {f"model.{n}": t for n, t in m.dflash()[1].items()}), (2, 5, 9)),
    "DFlash, encoder names": (
        lambda: renamed(renamed(m.dflash(), "fc.", "encoder.fc."), "hidden_norm.", "encoder.output_norm_enc."),
        (2, 5, 9),
    ),
    "DFlash, speculators": (m.dflash_speculators, (2, 5, 9)),
    "EAGLE3, midlayer": (m.eagle3, (2, 6, 9)),
    "EAGLE3, layers.0": (lambda: m.eagle3(prefix="layers.0."), (2, 6, 9)),
    "EAGLE3, aux norms": (lambda: aux_norms(m.eagle3()), (2, 6, 9)),
    "EAGLE3, top-level taps": (
        lambda: m.eagle3(eagle_config={}, eagle_aux_hidden_state_layer_ids=[3, 5, 7]), (3, 5, 7)
    ),
    "EAGLE3, nested taps that are hidden states": (
        lambda: m.eagle3(eagle_config={"eagle_aux_hidden_state_layer_ids": [2, 6, 9]}), (2, 6, 9)
    ),
    "EAGLE3, no taps": (lambda: m.eagle3(eagle_config={}), (2, 6, 9)),
}  # fmt: skip


@pytest.mark.parametrize(("make", "taps"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path: Path, make: Callable[[], Made], taps: tuple[int, ...]) -> None:
    loaded = load(tmp_path, make())
    assert loaded.drafter.taps == taps == loaded.choice.hidden_states
    assert str(list(taps)) in loaded.notes[0]
    own = sum(t.numel() * 4 for n, t in make()[1].items() if n not in ("d2t", "t2d"))
    assert loaded.drafter.nbytes == own


def test_speculators_eagle3_with_its_own_embedding(tmp_path: Path) -> None:
    flat, tensors = m.eagle3(prefix="layers.0.")
    config = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
        "transformer_layer_config": {k: v for k, v in flat.items() if k in m.sizes(1)},
        "eagle_aux_hidden_state_layer_ids": [2, 6, 9], "draft_vocab_size": 40, "norm_before_residual": True,
    }  # fmt: skip
    tensors["embed_tokens.weight"] = EMBED + 1
    loaded = load(tmp_path, (config, tensors))
    assert loaded.drafter.taps == (2, 6, 9)
    assert torch.equal(loaded.drafter.weights.shared.embed, EMBED + 1)


@pytest.mark.parametrize(
    ("offset", "taps"), [(0, (1, 4, 8)), (1, (2, 5, 9)), (None, (2, 5, 9)), ("auto", (2, 5, 9))]
)
def test_the_offset_of_taps_can_be_set(tmp_path: Path, offset: Any, taps: tuple[int, ...]) -> None:
    loaded = load(tmp_path, m.dflash(), tap_offset=offset)
    assert loaded.drafter.taps == taps
    assert ("--drafter-tap-offset" in loaded.notes[0]) is (offset in (0, 1))


def test_contradicting_taps_need_a_word_of_the_user(tmp_path: Path) -> None:
    made = m.eagle3(eagle_aux_hidden_state_layer_ids=[1, 5, 8])
    with pytest.raises(
        CheckpointError, match=r"nested taps \[1, 5, 8\] mean hidden states \[2, 6, 9\], the top-level"
    ):
        load(tmp_path, made)
    assert load(tmp_path, made, tap_offset=1).drafter.taps == (2, 6, 9)


def test_rope_theta_is_the_configs_unless_overridden(tmp_path: Path) -> None:
    made = m.dflash()
    assert load(tmp_path, made).drafter.settings.sizes.rope.theta == 1000.0
    assert load(tmp_path, made, rope_theta=77.0).drafter.settings.sizes.rope.theta == 77.0
    del made[0]["rope_theta"]
    loaded = load(tmp_path, made)
    assert loaded.drafter.settings.sizes.rope.theta == 10000.0
    assert "drafter: config.json states no rope_theta; taken: 10000, transformers' default" in loaded.notes


def test_padding_of_the_vocabulary_is_no_difference(tmp_path: Path) -> None:
    """NVIDIA's drafter for M2.7 has 200,055 tokens, the target 200,064 rows."""
    loaded = load(tmp_path, m.dflash(vocab_size=m.VOCAB - 9))
    assert any("vocab_size is 87, the target's 96" in note for note in loaded.notes)


def test_f16_weights_and_shards(tmp_path: Path) -> None:
    config, tensors = m.dflash()
    half = {n: t.half() for n, t in tensors.items()}
    names = sorted(half)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file, part in parts.items():
        save_file({n: half[n] for n in part}, tmp_path / file)
    weight_map = {n: file for file, part in parts.items() for n in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    drafter = load_drafter(tmp_path, m.TARGET, EMBED, HEAD, dtype=torch.float32).drafter
    assert torch.equal(drafter.weights.fc, half["fc.weight"].float())


# -- refusals --------------------------------------------------------------------------------------


def setting(**values: Any) -> m.Edit:
    return lambda config, tensors: config.update(values)


def nested(**values: Any) -> m.Edit:
    return lambda config, tensors: config["dflash_config"].update(values)


def without(*names: str) -> m.Edit:
    def edit(config: dict[str, Any], tensors: m.Tensors) -> None:
        for name in names:
            tensors.pop(name, None)
            config.pop(name, None)
            config.get("dflash_config", {}).pop(name, None)

    return edit


def tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> m.Edit:
    return lambda config, tensors: tensors.update({name: torch.zeros(*shape, dtype=dtype)})


def poisoned(config: dict[str, Any], tensors: m.Tensors) -> None:
    tensors["fc.weight"][3, 4] = float("nan")


def ids_for_offsets(config: dict[str, Any], tensors: m.Tensors) -> None:
    tensors["d2t"] = tensors["d2t"] + torch.arange(len(tensors["d2t"]))


def repeated(config: dict[str, Any], tensors: m.Tensors) -> None:
    tensors["d2t"][1] = tensors["d2t"][0] - 1
    tensors.pop("t2d")


def other_marks(config: dict[str, Any], tensors: m.Tensors) -> None:
    tensors["t2d"] = ~tensors["t2d"]


def swa(layers: list[str]) -> m.Edit:
    return setting(layer_types=layers)


SLIDING, FULL = "sliding_attention", "full_attention"
DFLASH: dict[str, tuple[m.Edit, str]] = {
    "DFlash2": (setting(architectures=["DFlash2DraftModel"]), "DFlash2 is not supported"),
    "DFlash2 by its keys": (nested(selector_rank=4), "DFlash2 is not supported"),
    "Domino": (nested(projector_type="domino"), "Domino is not supported"),
    "DSpark": (setting(architectures=["Qwen3DSparkModel"]), "DSpark is not supported"),
    "LiLiCorr": (setting(architectures=["LiLiCorrDFlashModel"]), "LiLiCorr is not supported"),
    "sample_from_anchor": (setting(sample_from_anchor=True), "DFlash with sample_from_anchor is not supported"),
    "P-EAGLE's mask_hidden": (tensor("mask_hidden", 1, m.D), "P-EAGLE (it has a tensor 'mask_hidden')"),
    "something else": (setting(architectures=["LlamaForCausalLM"]), "neither DFlash nor EAGLE3"),
    "attention sinks": (nested(attention_sink_bias=True), "dflash_config.attention_sink_bias is True"),
    "biases": (setting(attention_bias=True), "attention_bias is True, expected: False"),
    "activation": (setting(hidden_act="gelu"), "hidden_act is gelu, expected: silu"),
    "another rotation": (setting(is_neox_style=False), "is_neox_style is False, expected: True"),
    "quantized": (setting(quantization_config={"quant_method": "fp8"}), "config.json has a quantization_config"),
    "hidden size": (setting(hidden_size=32), "hidden_size is 32, the target's hidden_size is 24"),
    "target's hidden size": (setting(target_hidden_size=32), "target_hidden_size is 32, the target's hidden_size"),
    "larger vocabulary": (setting(vocab_size=97), "vocab_size is 97, the target's vocab_size is 96"),
    "another vocabulary": (setting(vocab_size=32), "vocab_size is 32, the target's vocab_size is 96"),
    "layers of another target": (setting(num_target_layers=62), "num_target_layers is 62, the target's num_hidden_lay"),
    "no mask token": (without("mask_token_id"), "mask_token_id is None, expected: 0 to 95"),
    "mask token": (nested(mask_token_id=96), "mask_token_id is 96, expected: 0 to 95"),
    "no block size": (without("block_size"), "block_size is None, expected: 2 to 1024"),
    "block size": (setting(block_size=1), "block_size is 1, expected: 2 to 1024"),
    "no taps": (nested(target_layer_ids=None), "states no target_layer_ids"),
    "taps out of range": (nested(target_layer_ids=[1, 4, 12]), "hidden state 13 of a target of 12 layers"),
    "taps of no sense": (nested(target_layer_ids=["x"]), "are no list of layers"),
    "too few taps": (nested(target_layer_ids=[1, 4]), "'fc.weight' has shape [24, 72], expected: [24, 48] for 2 taps"),
    "missing tensor": (without("layers.1.mlp.up_proj.weight"), "'layers.1.mlp.up_proj.weight' is missing, expected: ["),
    "unknown tensor": (tensor("layers.0.self_attn.sinks", 4), "'layers.0.self_attn.sinks' is not one of dflash's"),
    "wrong shape": (tensor("norm.weight", 25), "'norm.weight' has shape [25], expected: [24]"),
    "quantized tensor": (tensor("fc.weight", 24, 72, dtype=torch.uint8), "'fc.weight' is U8, expected: BF16"),
    "NaN": (poisoned, "'fc.weight' holds NaN or Inf"),
    "heads": (setting(num_key_value_heads=3), "num_key_value_heads is 3, expected: a divisor of 4 heads"),
    "no window": (swa([SLIDING, FULL]), "sliding_window is None, expected: 1 to"),
    "types of another number of layers": (swa([FULL]), "layer_types is ['full_attention'], expected: 2 of"),
    "unknown types": (swa(["chunked", FULL]), "layer_types is ['chunked'"),
    "causality": (nested(causal="yes"), "causal is yes, expected: true or false"),
    "epsilon": (setting(rms_norm_eps="x"), "rms_norm_eps is x"),
}  # fmt: skip
EAGLE3: dict[str, tuple[m.Edit, str]] = {
    "P-EAGLE": (setting(parallel_drafting=True), "P-EAGLE (parallel_drafting) is not supported"),
    "EAGLE 1": (setting(architectures=["LlamaForCausalLMEagle"]), "EAGLE before version 3 is not supported"),
    "without taps": (setting(eagle_config={"use_aux_hidden_state": False}), "a drafter without taps"),
    "two layers": (setting(num_hidden_layers=2), "EAGLE3 of 2 layers is not supported"),
    "no head": (without("lm_head.weight"), "lm_head.weight is missing; the target's head has 96 tokens of 24, the"),
    "head of the target's size": (tensor("lm_head.weight", 96, 24), "has shape [96, 24], expected: [40, 24]"),
    "no d2t": (without("d2t"), "draft_vocab_size is 40 of 96 tokens, but there is no d2t"),
    "ids for offsets": (ids_for_offsets, "d2t: row "),
    "repeated tokens": (repeated, "d2t: 1 rows lead to a token that another row has"),
    "d2t of floats": (tensor("d2t", 40), "d2t is F32, expected: I64"),
    "other marks": (other_marks, "t2d marks 56 tokens, d2t leads to 40"),
    "more drafts than tokens": (setting(draft_vocab_size=97), "draft_vocab_size is 97, the target's vocab_size is 96"),
    "fc_norm without tensors": (setting(fc_norm=True), "fc_norm is true, tensor 'fc_norm' is missing"),
    "one of three norms": (tensor("fc_norm.1.weight", 24), "'fc_norm.0.weight' is missing"),
    "sliding window": (swa([SLIDING]), "layer_types is sliding_attention, expected: full_attention"),
    "scale": (setting(logit_scale=0), "logit_scale is 0, expected: a positive number"),
    "a flag": (setting(norm_before_residual="x"), "norm_before_residual is x, expected: true or false"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "words"), DFLASH.values(), ids=DFLASH)
def test_dflash_that_does_not_fit(tmp_path: Path, edit: m.Edit, words: str) -> None:
    refuse(tmp_path, m.dflash(), edit, words)


@pytest.mark.parametrize(("edit", "words"), EAGLE3.values(), ids=EAGLE3)
def test_eagle3_that_does_not_fit(tmp_path: Path, edit: m.Edit, words: str) -> None:
    refuse(tmp_path, m.eagle3(), edit, words)


def refuse(folder: Path, made: Made, edit: m.Edit, words: str) -> None:
    edit(*made)
    with pytest.raises(CheckpointError) as fault:
        load(folder, made)
    assert words in fault.value.message
    assert fault.value.message.isprintable()
    assert fault.value.hint


def test_a_borrowed_head_needs_the_full_vocabulary(tmp_path: Path) -> None:
    loaded = load(tmp_path, m.eagle3(draft_vocab=None))
    assert torch.equal(loaded.drafter.weights.shared.head, HEAD)
    assert loaded.drafter.weights.shared.draft_to_target is None
    config, tensors = m.dflash(draft_vocab_size=40)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is missing; .* the drafter needs 40 of 24"):
        load(tmp_path / "dflash", (config, tensors))


def test_tied_embeddings(tmp_path: Path) -> None:
    """DFlash always has the target's head; an EAGLE3 head that is tied reads its embedding."""
    loaded = load(tmp_path / "dflash", m.dflash(tie_word_embeddings=True))
    assert torch.equal(loaded.drafter.weights.shared.head, HEAD)
    loaded = load(tmp_path / "eagle3", m.eagle3(draft_vocab=None, tie_word_embeddings=True))
    assert torch.equal(loaded.drafter.weights.shared.head, EMBED)


def test_an_identity_d2t_beside_a_borrowed_head_of_a_padded_vocabulary(tmp_path: Path) -> None:
    config, tensors = m.eagle3(draft_vocab=None, vocab_size=90, draft_vocab_size=90)
    tensors["d2t"] = torch.zeros(90, dtype=torch.int64)
    shared = load(tmp_path, (config, tensors)).drafter.weights.shared
    assert shared.head.shape == (90, m.D)
    assert shared.draft_to_target is not None
    assert shared.draft_to_target.tolist() == list(range(90))


def test_speculators_leaves_out_what_transformers_has_as_default(tmp_path: Path) -> None:
    """Qwen3's head_dim of 128 is not in the file; the hidden size divided by heads would be 6."""
    config, tensors = m.dflash_speculators()
    layer = config["transformer_layer_config"]
    layer["model_type"] = "qwen3"
    del layer["head_dim"]
    with pytest.raises(
        CheckpointError, match=r"k_norm.weight' has shape \[8\], expected: \[128\]|expected: \[512, 24\]"
    ):
        load(tmp_path, (config, tensors))


def test_pickles_and_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_drafter(tmp_path / "none", m.TARGET, EMBED, HEAD)
    config, tensors = m.dflash()
    folder = m.write(tmp_path / "mimo", config, tensors)
    (folder / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"mask_embedding.pt .* never loaded"):
        load_drafter(folder, m.TARGET, EMBED, HEAD)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        load_drafter(folder, m.TARGET, EMBED, HEAD)


@pytest.mark.parametrize("field", ["num_steps", "eagle_topk"])
def test_options_of_the_other_kind(tmp_path: Path, field: str) -> None:
    with pytest.raises(UsageError, match=f"{field} is 4; a DFlash drafter has one step and one branch"):
        load(tmp_path, m.dflash(), **{field: 4})
