"""Our decoder layer in F32 against transformers' MiniMax-M2 in F32, on the same dequantized weights.

transformers loads a BF16 copy through its own conversion of names and shapes.  It drops the router's selection bias
to BF16 when it loads in BF16, and before 5.18 it rotated the full head: both faults are injected here, and both
must be far outside of the tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MiniMaxM2ForCausalLM

from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.source import Source
from m27quant.runtime.streamed import logits
from tests.checkpoints import Shape, random_tensors, read_tensors, stored, write_checkpoint
from tests.oracles import modelopt_model as oracle
from tests.runtime.engines import Loaded, logits_in_pieces
from tests.tolerance import LOGIT_ATOL

SHAPES = {
    "gqa1": Shape(num_attention_heads=2, num_key_value_heads=2, num_local_experts=3),
    "gqa2": Shape(
        hidden_size=208, head_dim=24, rotary_dim=10, num_local_experts=8, num_experts_per_tok=3, num_hidden_layers=3
    ),
    "gqa4": Shape(hidden_size=272, intermediate_size=304, num_key_value_heads=1, rotary_dim=24, num_local_experts=5),
}  # fmt: skip
LENGTH = 160
FAR = 100 * LOGIT_ATOL
"""What an injected fault must exceed."""


@pytest.fixture(params=[*SHAPES, "tiny-m27"])
def checkpoint(request: pytest.FixtureRequest, repository: Path, tmp_path: Path) -> Path:
    """An FP8 source; the random ones have a selection bias of the official model's size, where BF16 is coarse.

    Their other constants are not the official ones, so that nothing passes that does not read config.json.
    """
    if request.param == "tiny-m27":
        return repository / "examples/tiny-m27"
    tensors = random_tensors(SHAPES[request.param])
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] += 9
    config = SHAPES[request.param].config() | {"rms_norm_eps": 1e-3, "rope_theta": 700}
    return write_checkpoint(tmp_path / "fp8", SHAPES[request.param], tensors=stored(tensors), config=config)


@pytest.fixture
def ids(checkpoint: Path) -> torch.Tensor:
    """Some text for the trained model, random ids for the others."""
    raw = raw_config(checkpoint)
    if (checkpoint / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        text = (checkpoint / "heldout.txt").read_text()[:4000]
        return torch.tensor(Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids[:LENGTH])
    return torch.randint(raw["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(1))


def raw_config(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return config


def transformers_model(checkpoint: Path, folder: Path, **changes: Any) -> MiniMaxM2ForCausalLM:
    """A BF16 copy of the checkpoint as transformers loads it, in F32, its bias restored from the checkpoint.

    `changes` are fields of config.json to replace.
    """
    tensors = read_tensors(checkpoint)
    raw = {k: v for k, v in raw_config(checkpoint).items() if k != "quantization_config"} | changes
    write_checkpoint(folder, tensors=oracle.bf16_copy(tensors), config=raw)
    model = MiniMaxM2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    )
    for i, layer in enumerate(model.model.layers):
        layer.mlp.e_score_correction_bias = tensors[
            f"model.layers.{i}.block_sparse_moe.e_score_correction_bias"
        ]
    assert {p.dtype for p in [*model.parameters(), *model.buffers()]} == {torch.float32}
    return model.eval()


@torch.no_grad()
def theirs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return result


def ours(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    with Source(Location(checkpoint)) as source:
        return logits(source, ids)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


# transformers and torch deprecate things of each other; the ids of M2's special tokens exceed small vocabularies.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_logits_are_those_of_transformers(
    checkpoint: Path, ids: torch.Tensor, tmp_path: Path, record_property: Any
) -> None:
    mine = ours(checkpoint, ids)
    assert mine.dtype == torch.float32
    assert mine.shape == (len(ids), raw_config(checkpoint)["vocab_size"])
    model = transformers_model(checkpoint, tmp_path / "copy")
    found = distance(mine, theirs(model, ids))
    record_property("largest_logit_difference", found)
    assert found <= LOGIT_ATOL
    assert float(mine.std()) > 0.5, "logits are not all alike"

    for invariant in (True, False):
        loaded = Loaded(checkpoint, dtype=torch.float32, invariant=invariant)
        engines = logits_in_pieces(loaded, ids, [100, 1, 1, len(ids) - 102])
        record_property(f"engine_{invariant=}", distance(engines, theirs(model, ids)))
        assert distance(engines, theirs(model, ids)) <= LOGIT_ATOL

    for layer in model.model.layers:  # what loading in BF16 does
        bias = layer.mlp.e_score_correction_bias
        layer.mlp.e_score_correction_bias = bias.bfloat16().float()
        assert not torch.equal(bias, layer.mlp.e_score_correction_bias)
    assert distance(mine, theirs(model, ids)) > FAR


def test_rotating_the_whole_head_is_noticed(checkpoint: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    head_dim = raw_config(checkpoint)["head_dim"]
    model = transformers_model(checkpoint, tmp_path / "copy", rotary_dim=head_dim)
    assert model.model.rotary_emb.inv_freq.shape == (head_dim // 2,)
    assert distance(ours(checkpoint, ids), theirs(model, ids)) > FAR


def test_the_oracle_of_quantization_is_transformers_too(
    checkpoint: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    """The model with a module per expert, which modelopt quantizes in other tests, is the fused one in F32."""
    model = oracle.build(raw_config(checkpoint), read_tensors(checkpoint)).float()
    assert (
        distance(theirs(model, ids), theirs(transformers_model(checkpoint, tmp_path / "copy"), ids))
        <= LOGIT_ATOL
    )


@pytest.mark.parametrize("bad", [[], [-1], [256]])
def test_ids_outside_of_the_vocabulary_are_refused(bad: list[int], tmp_path: Path) -> None:
    from m27quant.errors import UsageError

    with pytest.raises(UsageError, match="0 to 255"):
        ours(write_checkpoint(tmp_path / "fp8"), torch.tensor(bad))


def test_a_checkpoint_that_transformers_saved_is_read(tmp_path: Path) -> None:
    """A BF16 fine-tune: its rotation stands in `rope_parameters`, its router is BF16."""
    checkpoint = write_checkpoint(tmp_path / "fp8", SHAPES["gqa2"])
    model = transformers_model(checkpoint, tmp_path / "copy").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    raw = raw_config(tmp_path / "saved")
    assert "rope_theta" not in raw
    assert raw["rope_parameters"]["partial_rotary_factor"] == 10 / 24
    again = MiniMaxM2ForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, experts_implementation="eager"
    )
    ids = torch.arange(100)
    assert distance(ours(tmp_path / "saved", ids), theirs(again, ids)) <= LOGIT_ATOL
