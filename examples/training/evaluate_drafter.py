"""Measure an exported drafter with the runtime and write its model card.

python evaluate_drafter.py dflash eagle3 --data build/drafters --drafters examples

Every figure of the card comes from here: greedy text of the target behind held-out prompts, F32, batch-invariant, with
the drafter, with prompt lookup at as many drafts, and without any; the three texts have to be one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from drafter_card import render
from drafter_data import HELDOUT_PROMPT_LEN, TEXT_LEN, heldout_prompts
from generation import loop_share
from tokenizers import Tokenizer

import m27quant
from m27quant import SamplingParams
from m27quant.runtime.speculative.load import DrafterOptions
from m27quant.runtime.statistics import Acceptance

SETTINGS: dict[str, dict[str, tuple[DrafterOptions, int]]] = {
    "dflash": {
        "block of 8 (`--num-draft-tokens 7`)": (DrafterOptions(num_draft_tokens=7), 7),
        "block of 16": (DrafterOptions(), 15),
    },
    "eagle3": {
        "chain of 3": (DrafterOptions(num_steps=3), 3),
        "tree 3/4/8 (`--num-steps 3 --eagle-topk 4 --num-draft-tokens 8`)": (
            DrafterOptions(num_steps=3, eagle_topk=4, num_draft_tokens=8), 7
        ),
    },
}  # fmt: skip
"""What is measured, and the drafts of prompt lookup beside it."""


def heldout_ids(checkpoint: Path) -> torch.Tensor:
    """The held-out text as the target's card has it."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return torch.tensor(tokenizer.encode((checkpoint / "heldout.txt").read_text(encoding="utf-8")).ids)


def generate(
    checkpoint: Path, prompts: list[list[int]], drafter: str | None, options: DrafterOptions | None
) -> tuple[list[list[int]], dict[str, Any]]:
    """(token ids, how drafts fared over all steps), TEXT_LEN tokens behind each prompt."""
    llm = m27quant.load(checkpoint, drafter=drafter, drafter_options=options, dtype="float32", invariant=True)
    results = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=TEXT_LEN, ignore_eos=True))
    return [result.token_ids for result in results], pooled([result.stats.acceptance for result in results])


def pooled(requests: list[Acceptance]) -> dict[str, Any]:
    """All steps together."""
    steps = sum(r.num_steps for r in requests)
    longest = max(len(r.c_k) for r in requests)
    c_k = [sum(r.c_k[k] * r.num_steps for r in requests if k < len(r.c_k)) / steps for k in range(longest)]
    m_accept = sum(r.num_accepted for r in requests) / steps
    return {"tau": 1 + m_accept, "m_accept": m_accept, "c_k": c_k, "steps": steps}


class Measurement:
    """Runs over one set of prompts; what does not depend on the drafter is run once."""

    def __init__(self, checkpoint: Path, num_prompts: int) -> None:
        every = heldout_prompts(heldout_ids(checkpoint))
        self.checkpoint, self.prompts = checkpoint, every[:: len(every) // num_prompts]
        self.plain, _ = self.run(None, None)
        self.lookups: dict[int, dict[str, Any]] = {}

    def run(
        self, drafter: str | None, options: DrafterOptions | None
    ) -> tuple[list[list[int]], dict[str, Any]]:
        return generate(self.checkpoint, self.prompts.tolist(), drafter, options)

    def checked(self, drafter: str, options: DrafterOptions) -> dict[str, Any]:
        """How drafts fared; the text has to be the one without a drafter."""
        ids, found = self.run(drafter, options)
        assert ids == self.plain, f"{drafter} changed the text"
        print(drafter, options.num_draft_tokens, json.dumps(found), flush=True)
        return found

    def lookup(self, num_drafts: int) -> dict[str, Any]:
        if num_drafts not in self.lookups:
            self.lookups[num_drafts] = self.checked("ngram", DrafterOptions(num_draft_tokens=num_drafts))
        return self.lookups[num_drafts]

    def of(self, kind: str, drafter: Path) -> dict[str, Any]:
        """All settings of a kind."""
        return {
            name: {"drafter": self.checked(str(drafter), options), "ngram": self.lookup(num_drafts)}
            for name, (options, num_drafts) in SETTINGS[kind].items()
        }

    def repeats(self) -> float:
        return loop_share(torch.cat([self.prompts, torch.tensor(self.plain)], 1), HELDOUT_PROMPT_LEN)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure exported drafters and write their model cards.")
    parser.add_argument("kinds", nargs="+", choices=tuple(SETTINGS))
    parser.add_argument(
        "--data", type=Path, default=Path("build/drafters"), help="folder with the training states"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("examples/tiny-m27"))
    parser.add_argument(
        "--drafters", type=Path, default=Path("examples"), help="folder with tiny-m27-dflash, ..."
    )
    parser.add_argument(
        "--num-prompts", type=int, default=64, help="of the 128 held-out ones, at even distances"
    )
    args = parser.parse_args()
    measurement = Measurement(args.checkpoint, args.num_prompts)
    for kind in args.kinds:
        folder = args.drafters / f"tiny-m27-{kind}"
        state = torch.load(args.data / f"{kind}.pt")
        found = {
            "settings": measurement.of(kind, folder),
            "num_prompts": len(measurement.prompts),
            "loop_share": measurement.repeats(),
            "steps": state["step"],
            "groups": len(list(args.data.glob("train-*.pt"))),
            "parameters": sum(w.numel() for w in state["masters"].values()),
            "megabytes": (folder / "model.safetensors").stat().st_size / 1e6,
        }
        (args.data / f"{kind}-figures.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(render(kind, found), encoding="utf-8")


if __name__ == "__main__":
    main()
