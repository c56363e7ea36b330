"""The engine's logits against independent forward passes in F32, however the tokens are cut into pieces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from m27quant import quantize_checkpoint
from m27quant.checkpoint.tokenizer import Tokenizer
from tests.checkpoints import Shape, read_tensors, write_checkpoint, write_rows
from tests.oracles.forward import Forward
from tests.runtime.engines import Loaded, logits_in_pieces, states_of
from tests.tolerance import LOGIT_ATOL, SQNR_OTHER_ORDER_DB, sqnr_db

SHAPES = {
    "gqa1": Shape(num_attention_heads=2, num_key_value_heads=2, num_local_experts=3),
    "gqa2": Shape(hidden_size=208, head_dim=24, rotary_dim=10, num_local_experts=8, num_experts_per_tok=3),
    "gqa4": Shape(hidden_size=272, intermediate_size=304, num_key_value_heads=1, rotary_dim=24, num_local_experts=5),
}  # fmt: skip
LENGTH = 40
PIECES = {"at once": [40], "two": [16, 24], "odd": [1, 17, 5, 16, 1], "token by token": [1] * 40}


@pytest.fixture(scope="module", params=[*SHAPES, "tiny-m27"])
def nvfp4(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_nvfp4: Path) -> Path:
    if request.param == "tiny-m27":
        return tiny_nvfp4
    home = tmp_path_factory.mktemp("logits")
    source = write_checkpoint(home / "fp8", SHAPES[request.param])
    quantize_checkpoint(str(source), home / "nvfp4", dataset=str(write_rows(home / "rows.jsonl")))
    return home / "nvfp4"


def some_ids(checkpoint: Path, vocab_size: int) -> torch.Tensor:
    if (checkpoint / "tokenizer.json").exists():
        text = (Path(__file__).parents[2] / "examples/tiny-m27/heldout.txt").read_text()[:2000]
        return torch.tensor(Tokenizer(checkpoint).text(text)[:LENGTH])
    return torch.randint(vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1))


def oracle(checkpoint: Path, activations: str) -> Forward:
    config = json.loads((checkpoint / "config.json").read_text())
    return Forward(read_tensors(checkpoint), config, activations=activations)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def test_nothing_is_rounded_that_should_not_be(nvfp4: Path, tmp_path: Path, record_property: Any) -> None:
    """W4A16 with an F32 cache, as a checkpoint has it that asks for no FP8 cache: the whole model at once."""
    folder = shutil.copytree(nvfp4, tmp_path / "no-fp8")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["kv_cache_scheme"]
    (folder / "config.json").write_text(json.dumps(config))
    ids = some_ids(nvfp4, config["vocab_size"])
    loaded = Loaded(folder, activations="bf16", dtype=torch.float32)
    assert loaded.form.kv_dtype == torch.float32
    found = logits_in_pieces(loaded, ids, [LENGTH])
    expected = oracle(nvfp4, "bf16").logits(ids)
    record_property("largest_logit_difference", distance(found, expected))
    assert distance(found, expected) <= LOGIT_ATOL
    assert float(expected.std()) > 0.5


@pytest.mark.parametrize("activations", ["bf16", "nvfp4"])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "bf16"])
def test_every_layer_is_that_of_an_independent_forward_pass(
    nvfp4: Path, activations: Any, kv_cache_dtype: Any, record_property: Any
) -> None:
    """Layer by layer from the engine's own states, so that a number in the middle of two roundings stays where it is.

    What is in the cache has to be a rounding of the oracle's keys and values; what it makes of them has to agree.
    """
    loaded = Loaded(nvfp4, activations=activations, kv_cache_dtype=kv_cache_dtype, dtype=torch.float32)
    forward = oracle(nvfp4, activations)
    ids = some_ids(nvfp4, forward.c["vocab_size"])
    states = states_of(loaded, ids)
    undecided, largest = 0, 0.0
    for layer in range(forward.c["num_hidden_layers"]):
        x = states.hidden[layer]
        scales = [forward.t[f"model.layers.{layer}.self_attn.{n}_proj.{n}_scale"] for n in "kv"]
        exact = forward.keys_and_values(x, layer)
        cached = (states.keys[layer], states.values[layer])
        for stored, wanted, scale in zip(cached, exact, scales, strict=True):
            assert_is_rounding(stored, wanted, scale, kv_cache_dtype)
        decoded = [
            c.float() * s if kv_cache_dtype == "fp8" else c.float()
            for c, s in zip(cached, scales, strict=True)
        ]
        x = x + forward.attention(x, layer, *decoded)
        x = x + forward.experts(x, layer)
        decided = ~forward.undecided
        undecided += int(forward.undecided.sum())
        largest = max(largest, distance(states.hidden[layer + 1][decided], x[decided]))
    logits = distance(states.logits, forward.head(states.hidden[-1]))
    record_property("largest_difference", max(largest, logits))
    record_property("undecided_rows", undecided)
    assert max(largest, logits) <= LOGIT_ATOL
    assert undecided <= 0.1 * len(ids) * forward.c["num_hidden_layers"]


def assert_is_rounding(stored: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor, kind: str) -> None:
    """Stored is what some number within 1e-5 of the exact one is rounded to."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return (
            (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            if kind == "fp8"
            else x.bfloat16().float()
        )

    low, high = rounded(exact - 1e-5), rounded(exact + 1e-5)
    assert bool(((low <= stored.float()) & (stored.float() <= high)).all())
    assert float((low == high).float().mean()) > 0.9


@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_however_the_tokens_are_cut(nvfp4: Path, dtype: torch.dtype, invariant: bool) -> None:
    for activations in ("bf16", "nvfp4"):
        for kv_cache_dtype in ("fp8", "bf16"):
            loaded = Loaded(
                nvfp4,
                activations=activations,
                kv_cache_dtype=kv_cache_dtype,
                dtype=dtype,
                invariant=invariant,
            )
            ids = some_ids(nvfp4, loaded.model.config.vocab_size)
            whole = logits_in_pieces(loaded, ids, [LENGTH])
            for name, pieces in PIECES.items():
                found = logits_in_pieces(loaded, ids, pieces)
                if invariant:
                    assert torch.equal(found, whole), name
                else:
                    assert sqnr_db(whole, found) > SQNR_OTHER_ORDER_DB, name
