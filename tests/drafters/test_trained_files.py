"""The drafters in examples/ load into transformers' Qwen3 and Llama modules, which draft the same tokens.

speculators 0.9 wants a transformers of at most 5.19, older than the one this suite runs with, and cannot be installed
beside it: `tests/oracles/speculators_drafters.py` is the same comparison as a script.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from benchmarks.training_peers import PlainDFlash, PlainEagle3
from m27quant.drafters.batch import Batch, Shared
from m27quant.drafters.dflash import DFlashSpec
from m27quant.drafters.eagle3 import Eagle3Spec
from tests.drafters.making import SIZES
from tests.drafters.trained import LENGTH, PLACES, Trained, trained


def sizes(of: Trained) -> tuple[dict[str, Any], dict[str, Any]]:
    config = json.loads((of.folder / "config.json").read_text(encoding="utf-8"))
    return config, {key: config[key] for key in SIZES} | {"hidden_states": of.drafter.taps}


def batch(of: Trained, tokens: list[int]) -> Batch:
    ones = torch.ones(1, len(tokens), dtype=torch.bool)
    return Batch(
        torch.tensor([tokens]), torch.tensor([len(tokens)]), ones, of.taps[None], of.taps[None, :, :1]
    )


@torch.no_grad()
def test_dflash_in_qwen3s_modules() -> None:
    of = trained("dflash")
    config, named = sizes(of)
    spec = DFlashSpec(
        **named, block_size=config["block_size"], mask_token_id=config["dflash_config"]["mask_token_id"]
    )
    module = PlainDFlash(spec)
    module.load_state_dict(of.tensors)
    anchors = torch.tensor([[n - 1 for n in PLACES]])
    hidden: Tensor = module.hidden(batch(of, of.tokens), anchors, Shared(of.embed, of.head), spec.block_size)
    drafts = (hidden[0, :, 1:] @ of.head.T).argmax(-1)
    assert drafts.tolist() == list(of.drafts.values())


@torch.no_grad()
def test_eagle3_in_llamas_modules() -> None:
    steps = 5
    of = trained("eagle3", num_steps=steps)
    config, named = sizes(of)
    module = PlainEagle3(Eagle3Spec(**named, draft_vocab_size=config["draft_vocab_size"]))
    module.load_state_dict({n: t for n, t in of.tensors.items() if n not in ("d2t", "t2d")})
    for n, expected in of.drafts.items():
        text = [*of.tokens[:n], *expected, *of.tokens[n + steps :]]  # the chain goes on from its own drafts
        assert len(text) == LENGTH
        hidden = module.hidden(batch(of, text), Shared(of.embed, of.head), steps)
        rows = [int(module.lm_head(h[0, n - 2]).argmax()) for h in hidden]
        assert [row + int(of.tensors["d2t"][row]) for row in rows] == expected
