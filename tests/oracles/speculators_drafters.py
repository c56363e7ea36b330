"""The drafters in examples/ in speculators' own classes: the same drafts as by the runtime.  A script, no test.

speculators 0.9 pins transformers to at most 5.19, and the suite runs with a newer one; its drafters run with both.  In
a copy of the development environment:

    pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0 openai jiter sniffio
    python -W ignore -m tests.oracles.speculators_drafters
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"


from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig, core
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig, Qwen3Config

from tests.drafters.making import SIZES
from tests.drafters.trained import PLACES, Trained, trained

STEPS = 5


def layer_config(of: Trained, kind: Any) -> tuple[dict[str, Any], Any]:
    config = json.loads((of.folder / "config.json").read_text(encoding="utf-8"))
    sizes = {key: config[key] for key in SIZES if key != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    made = kind(**sizes, vocab_size=config["vocab_size"], rope_parameters=rope)
    made._attn_implementation = "eager"
    return config, made


def settings(algorithm: str, tokens: int) -> SpeculatorsConfig:
    return SpeculatorsConfig(
        algorithm=algorithm, proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=tokens)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path="target", architectures=["MiniMaxM2ForCausalLM"]),
    )  # fmt: skip


def load(model: Any, of: Trained, head: torch.Tensor) -> Any:
    """The file's tensors, and what the target lends."""
    tensors = {name.replace("midlayer.", "layers.0."): t for name, t in of.tensors.items()}
    lent = {"embed_tokens.weight": of.embed, "lm_head.weight": head, "verifier_lm_head.weight": head}
    lent["verifier_norm.weight"] = torch.ones(of.embed.shape[1])
    told = model.load_state_dict(lent | tensors, strict=False)
    missing = [name for name in told.missing_keys if "rotary" not in name and name not in ("d2t", "t2d")]
    assert not missing, missing
    assert not [name for name in told.unexpected_keys if not name.startswith("verifier_")], (
        told.unexpected_keys
    )
    return model.eval()


def dflash() -> bool:
    of = trained("dflash")
    config, layers = layer_config(of, Qwen3Config)
    block = config["block_size"]
    model = DFlashDraftModel(DFlashSpeculatorConfig(
        transformer_layer_config=layers, draft_vocab_size=len(of.head), block_size=block,
        aux_hidden_state_layer_ids=list(of.drafter.taps), mask_token_id=config["dflash_config"]["mask_token_id"],
        speculators_config=settings("dflash", block - 1),
    )).float()  # fmt: skip
    load(model, of, of.head)
    T, anchors = len(of.tokens), torch.tensor([n - 1 for n in PLACES])
    chosen = (anchors, torch.ones(len(anchors), dtype=torch.bool))
    core.select_anchors = lambda *_, **__: chosen
    with torch.no_grad():
        _, logits, *_ = model._backbone_forward(
            of.taps[None], torch.tensor([of.tokens]), torch.ones(1, T, dtype=torch.long),
            torch.zeros(1, T, of.embed.shape[1]), torch.zeros(1, T, dtype=torch.long), max_anchors=len(anchors),
        )  # fmt: skip
    drafts = logits.view(len(anchors), block, -1)[:, 1:].argmax(-1).tolist()
    return bool(drafts == list(of.drafts.values()))


def eagle3() -> bool:
    of = trained("eagle3", num_steps=STEPS)
    config, layers = layer_config(of, LlamaConfig)
    model = Eagle3DraftModel(Eagle3SpeculatorConfig(
        transformer_layer_config=layers, draft_vocab_size=config["draft_vocab_size"], norm_before_residual=False,
        eagle_aux_hidden_state_layer_ids=list(of.drafter.taps), speculators_config=settings("eagle3", STEPS),
    )).float()  # fmt: skip
    load(model, of, of.tensors["lm_head.weight"])
    same = []
    for n, expected in of.drafts.items():
        ids = [*of.tokens[1:n], *expected]
        taps = torch.cat((of.taps[: n - 1], torch.zeros(STEPS, of.taps.shape[1])))
        with torch.no_grad():
            drafts = model(
                hidden_states=taps[None], input_ids=torch.tensor([ids]), ttt_steps=STEPS, return_loss=False,
                document_ids=torch.zeros(1, len(ids), dtype=torch.long),
            )  # fmt: skip
        rows = [int(d[0, n - 2]) for d in drafts]
        same.append([row + int(of.tensors["d2t"][row]) for row in rows] == expected)
    return all(same)


if __name__ == "__main__":
    results = {"dflash": dflash(), "eagle3": eagle3()}
    sys.stdout.write(
        "".join(f"{kind}: drafts {'equal' if ok else 'DIFFER'}\n" for kind, ok in results.items())
    )
    sys.exit(not all(results.values()))
