"""The tiny drafters on the model that they were trained for, through the engine: text unchanged, drafts accepted.

How much they accept is in their cards; here it is only more than half of that, on a few prompts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.runtime.api import LLM, GenerateResult
from m27quant.runtime.generation import SamplingParams
from m27quant.runtime.speculative import choose
from m27quant.runtime.speculative.choose import make_named
from m27quant.runtime.speculative.load import DrafterOptions
from tests.runtime.engines import Loaded

PROMPTS, PROMPT_LEN, LENGTH = 12, 48, 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
DRAFTERS: dict[str, tuple[str, DrafterOptions, float]] = {
    "n-gram": ("ngram", DrafterOptions(num_draft_tokens=7), 1.1),
    "DFlash, block of 4": ("tiny-m27-dflash", DrafterOptions(num_draft_tokens=3), 1.5),
    "DFlash, block of 8": ("tiny-m27-dflash", DrafterOptions(), 1.5),
    "EAGLE3 chain": ("tiny-m27-eagle3", DrafterOptions(num_steps=3), 1.5),
    "EAGLE3 tree": ("tiny-m27-eagle3", DrafterOptions(num_steps=3, eagle_topk=4, num_draft_tokens=8), 1.8),
}
"""Name or folder, options, tau at least."""


@pytest.fixture(scope="module")
def loaded(repository: Path) -> Loaded:
    return Loaded(repository / "examples/tiny-m27")


@pytest.fixture(scope="module")
def prompts(repository: Path) -> list[list[int]]:
    """Of different lengths, from text that neither was trained on."""
    folder = repository / "examples/tiny-m27"
    ids = Tokenizer(folder).rendered((folder / "heldout.txt").read_text(encoding="utf-8"))
    starts = torch.linspace(0, len(ids) - PROMPT_LEN - 1, PROMPTS).long().tolist()
    return [ids[start : start + PROMPT_LEN - 3 * i] for i, start in enumerate(starts)]


@pytest.fixture(scope="module")
def plain(loaded: Loaded, prompts: list[list[int]]) -> list[list[int]]:
    return tokens_of(engine(loaded).generate(prompts, GREEDY))


def engine(loaded: Loaded, name: str = "none", **options: int) -> LLM:
    """With a drafter of `DRAFTERS`, or none."""
    drafter = None
    if name in DRAFTERS:
        where, settings, _ = DRAFTERS[name]
        path = where if where == "ngram" else loaded.folder.parent / where
        drafter = make_named(path, settings, loaded.folder)(loaded.model)
    return loaded.engine(num_blocks=200, drafter=drafter, **options)


def tokens_of(results: list[GenerateResult]) -> list[list[int]]:
    return [result.token_ids for result in results]


def tau(results: list[GenerateResult]) -> float:
    stats = [r.stats.acceptance for r in results]
    return 1 + sum(s.num_accepted for s in stats) / sum(s.num_steps for s in stats)


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_is_that_without_a_drafter(
    loaded: Loaded, prompts: list[list[int]], plain: list[list[int]], name: str
) -> None:
    results = engine(loaded, name).generate(prompts, GREEDY)
    assert tokens_of(results) == plain
    assert tau(results) > DRAFTERS[name][2]


@pytest.mark.parametrize("name", ["DFlash, block of 8", "EAGLE3 tree"])
def test_few_blocks_chunks_and_other_batches_change_nothing(
    loaded: Loaded, prompts: list[list[int]], plain: list[list[int]], name: str
) -> None:
    """Two at a time, prompts in pieces of 20 tokens, a cache that a third of them fills."""
    some = slice(0, PROMPTS, 2)
    results = engine(loaded, name, max_num_seqs=2, max_num_batched_tokens=20).generate(prompts[some], GREEDY)
    assert tokens_of(results) == plain[some]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_text_is_that_without_a_drafter(
    loaded: Loaded, prompts: list[list[int]], temperature: float
) -> None:
    params = [
        SamplingParams(temperature=temperature, top_k=40, top_p=0.95, max_tokens=16, seed=seed)
        for seed in range(PROMPTS // 2)
    ]
    some = prompts[1::2]
    without = tokens_of(engine(loaded).generate(some, params))
    for name in ("DFlash, block of 8", "EAGLE3 tree"):
        assert tokens_of(engine(loaded, name).generate(some, params)) == without


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_taps_are_measured(loaded: Loaded, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both conventions are tried; the one that was trained is taken, and what was seen is told."""
    monkeypatch.setattr(choose, "PROBE_TOKENS", 120)
    said: list[str] = []
    folder = loaded.folder.parent / f"tiny-m27-{kind}"
    make_named(folder, DrafterOptions(tap_offset="auto"), loaded.folder, said.append)(loaded.model)
    assert "(offset 1, " in said[0]
    assert "offset 0: " in said[0]
