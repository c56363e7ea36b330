"""The drafters in examples/, real text that their target has read, and what the runtime drafts there, in F32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from m27quant.drafters.samples import sample_of
from m27quant.drafters.states import TargetStates
from m27quant.runtime.speculative.dflash import DFlashDrafter
from m27quant.runtime.speculative.eagle3 import Eagle3Drafter
from m27quant.runtime.speculative.load import DrafterOptions, load_drafter
from m27quant.runtime.speculative.proposal import DraftRequest

EXAMPLES = Path(__file__).parents[2] / "examples"
LENGTH, PLACES = 72, (20, 33, 47)
"""Tokens of the text, and after how many of them is drafted."""


@dataclass(frozen=True)
class Trained:
    """A drafter's file and the runtime's drafts."""

    folder: Path
    drafter: DFlashDrafter | Eagle3Drafter
    tensors: dict[str, Tensor]
    """Floating ones in F32."""
    tokens: list[int]
    taps: Tensor
    embed: Tensor
    head: Tensor
    drafts: dict[int, list[int]]
    """By the number of tokens that came before."""


@lru_cache(maxsize=1)
def _target() -> tuple[TargetStates, list[int]]:
    states = TargetStates.open(EXAMPLES / "tiny-m27", check=False)
    text = (EXAMPLES / "tiny-m27" / "heldout.txt").read_text(encoding="utf-8")
    return states, states.tokenizer.text(text[:2000])[:LENGTH]


def trained(kind: str, num_steps: int | None = None) -> Trained:
    states, tokens = _target()
    folder, embed, head = EXAMPLES / f"tiny-m27-{kind}", states.embed.float(), states.head.float()
    drafter = load_drafter(
        folder, states.config, embed, head, DrafterOptions(num_steps=num_steps), dtype=torch.float32
    ).drafter
    ((taps, _),) = states.of([sample_of("text", [], tokens)], drafter.taps)
    drafts = {}
    for n in PLACES:
        (proposal,) = drafter.propose([DraftRequest(n, tokens[:n], taps[: n - 1].float(), 99)])
        drafts[n] = proposal.tokens
    tensors = {
        n: t.float() if t.is_floating_point() else t
        for n, t in load_file(folder / "model.safetensors").items()
    }
    return Trained(folder, drafter, tensors, tokens, taps.float(), embed, head, drafts)
