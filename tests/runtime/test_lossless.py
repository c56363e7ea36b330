"""With and without a drafter: the same tokens, or the first that differs and by how little."""

from __future__ import annotations

from pathlib import Path

import pytest

from m27quant import SamplingParams
from m27quant.llm import load
from m27quant.runtime import engine
from m27quant.runtime.api import LLM
from m27quant.runtime.lossless import compare_with_plain
from m27quant.runtime.speculative.acceptance import Accepted
from m27quant.runtime.speculative.load import DrafterOptions
from m27quant.runtime.speculative.proposal import Proposal

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ["import os\nimport sys\n", "a = 1\nb = 2\na = 1\nb = 2\n", "def f(x):\n"]
GREEDY = [SamplingParams(temperature=0.0, max_tokens=24)] * len(PROMPTS)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load(EXAMPLES / "tiny-m27", drafter="ngram", drafter_options=DrafterOptions(num_draft_tokens=4))


def test_the_same_tokens_and_both_speeds(llm: LLM) -> None:
    found = compare_with_plain(llm, PROMPTS, GREEDY)
    assert found.is_lossless
    assert found.first is None
    assert found.tokens_per_s > 0
    assert found.plain_tokens_per_s > 0
    assert sum(r.stats.acceptance.num_drafted for r in found.results) > 0
    assert llm.engine.drafter is not None


def test_requests_without_a_seed_draw_the_same_numbers_twice(llm: LLM) -> None:
    sampled = [SamplingParams(temperature=1.0, max_tokens=24)] * len(PROMPTS)
    assert compare_with_plain(llm, PROMPTS, sampled).is_lossless


def test_a_wrong_rule_of_acceptance_is_found(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def believing(proposal: Proposal, choices: list[int]) -> Accepted:
        """Takes every first draft for granted."""
        if not proposal.tokens:
            return Accepted([choices[0]], [])
        return Accepted([proposal.tokens[0], choices[1]], [0])

    monkeypatch.setattr(engine, "accept", believing)
    found = compare_with_plain(llm, PROMPTS, GREEDY)
    assert found.num_different > 0
    assert found.first is not None
    assert found.first.token != found.first.plain_token
    assert found.first.margin is not None
    assert found.first.margin > 0


def test_results_at_hand_are_compared_with(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=12, seed=1)]
    results = llm.generate(PROMPTS[:1], params)
    assert compare_with_plain(llm, PROMPTS[:1], params, results).results is results


def test_taps_are_measured_where_that_is_asked_for() -> None:
    said: list[str] = []
    load(
        EXAMPLES / "tiny-m27",
        drafter=EXAMPLES / "tiny-m27-eagle3",
        drafter_options=DrafterOptions(tap_offset="auto"),
        say=said.append,
    )
    line = next(line for line in said if "first draft agrees" in line)
    assert "hidden states [2, 4, 5]" in line
