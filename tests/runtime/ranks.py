"""One rank of several: loads a checkpoint, answers prompts, and says what came out.  Started by torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import m27quant
from m27quant.runtime.probe import logits_of
from m27quant.runtime.speculative.ngram import NgramDrafter


def main() -> None:
    checkpoint, out, dtype = sys.argv[1:4]
    torch.set_num_threads(1)
    given: dict[str, Any] = {"check": False, "dtype": dtype, "max_model_len": 512, "kv_cache_memory": 2**22}
    llm = m27quant.load(checkpoint, **given, drafter=NgramDrafter() if len(sys.argv) > 4 else None)
    prompts = [list(range(5 + n, 40 + 3 * n)) for n in range(4)]
    greedy = llm.generate(prompts, m27quant.SamplingParams(temperature=0.0, max_tokens=12))
    drawn = llm.generate(prompts, m27quant.SamplingParams(temperature=1.0, max_tokens=12, seed=3))
    rank = os.environ.get("RANK", "alone")
    result = {
        "greedy": [r.token_ids for r in greedy],
        "drawn": [r.token_ids for r in drawn],
        "weights": llm.model.nbytes,
        "cache": llm.engine.cache.nbytes,
        "heads": llm.engine.cache.shape.num_kv_heads,
    }
    Path(f"{out}-{rank}.json").write_text(json.dumps(result))
    torch.save(logits_of(llm.model, prompts[3]), f"{out}-{rank}.pt")


if __name__ == "__main__":
    main()
