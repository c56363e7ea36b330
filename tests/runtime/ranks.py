"""One rank of several: loads a checkpoint, answers prompts, and says what came out.  Started by torchrun."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

import m27quant
from m27quant.runtime.probe import logits_of


def answers(checkpoint: str, dtype: str, drafter: str | None = None) -> dict[str, Any]:
    """What a program says that neither knows nor cares how many ranks there are."""
    given: dict[str, Any] = {"check": False, "dtype": dtype, "max_model_len": 512, "kv_cache_memory": 2**22}
    llm = m27quant.load(checkpoint, **given, drafter=drafter)
    prompts = [list(range(5 + n, 40 + 3 * n)) for n in range(4)]
    greedy = llm.generate(prompts, m27quant.SamplingParams(temperature=0.0, max_tokens=12))
    drawn = llm.generate(prompts, m27quant.SamplingParams(temperature=1.0, max_tokens=12, seed=3))
    return {
        "greedy": [r.token_ids for r in greedy],
        "drawn": [r.token_ids for r in drawn],
        "weights": llm.model.nbytes,
        "heads": llm.engine.cache.shape.num_kv_heads,
        "logits": logits_of(llm.model, prompts[3]),
    }


def main() -> None:
    torch.set_num_threads(1)
    checkpoint, out, dtype = sys.argv[1:4]
    torch.save(answers(checkpoint, dtype, "ngram"), f"{out}-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
