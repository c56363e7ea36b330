"""Steps through finished texts: known drafts give known C_k, and the steps are the engine's own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import m27quant
from m27quant import SamplingParams
from m27quant.drafters.metrics import AcceptanceStats, total
from m27quant.drafters.walk import Text, repeated_share, walk
from m27quant.runtime.speculative.lengths import agreeing
from m27quant.runtime.speculative.proposal import DraftRequest, Proposal, chain


class Scripted:
    """Drafts what a function says, and checks that taps come once for each position."""

    def __init__(self, say: Callable[[list[int]], Proposal], most: int, taps: tuple[int, ...] = ()) -> None:
        self.say, self.taps = say, taps
        self.num_draft_tokens = self.max_depth = most
        self.seen: dict[int, int] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Proposal]:
        found = []
        for request in requests:
            if self.taps:
                assert request.taps is not None
                first = self.seen.get(request.sequence, 0)
                assert request.taps[:, 0].tolist() == list(range(first, len(request.tokens) - 1))
                self.seen[request.sequence] = len(request.tokens) - 1
            tokens, parents = self.say(request.tokens)
            found.append(Proposal(tokens[: request.max_tokens], parents[: request.max_tokens]))
        return found

    def forget(self, sequence: int) -> None:
        self.seen.pop(sequence, None)


def test_known_drafts_give_known_shares() -> None:
    text = Text([9, 9, 0, 1, 2, 3, 4, 5, 6, 7], num_prompt=2, max_length=10)
    right = {3: 2, 6: 0, 7: 1, 9: 3}
    """By committed tokens, how many drafts are right; the first token comes with the prompt."""

    def say(tokens: list[int]) -> Proposal:
        count = right[len(tokens)]
        following = text.tokens[len(tokens) : len(tokens) + count]
        return chain([*following, 99, 99, 99][:3])

    (stats,) = walk(Scripted(say, 3), [text], [None])
    # 3 committed: 1 2 accepted, 3 by the target; 6: 4 by the target; 7: 5 accepted, 6; 9: no room for drafts
    assert stats.histogram == (2, 1, 1)
    assert stats.c_k == [2 / 4, 1 / 4]
    assert stats.tau == 1 + 3 / 4
    assert stats.num_drafted == 3 + 3 + 2
    assert 1 + stats.num_steps + stats.num_accepted == 8, "all tokens behind the prompt"


def test_a_text_that_ended_by_itself_is_drafted_beyond_its_end() -> None:
    text = Text([9, 0, 1, 2], num_prompt=1, max_length=100)
    (stats,) = walk(Scripted(lambda tokens: chain([1, 2, 3, 4]), 4), [text], [None])
    assert stats.histogram == (0, 0, 1)
    assert stats.num_drafted == 4


def test_the_path_of_a_tree() -> None:
    tree = Proposal([5, 6, 7, 8, 7], [-1, -1, 1, 2, 0])
    assert agreeing(tree, [0, 6, 7, 8], 1) == 3
    assert agreeing(tree, [0, 6, 7], 1) == 2
    assert agreeing(tree, [0, 5, 7, 8], 1) == 2
    assert agreeing(tree, [0, 9], 1) == 0
    assert agreeing(Proposal([], []), [0, 9], 1) == 0


def test_taps_come_once_for_each_position() -> None:
    texts = [Text(list(range(n)), 2, n) for n in (12, 5, 3)]
    taps = [torch.arange(len(text.tokens) - 1)[:, None] for text in texts]
    drafter = Scripted(lambda tokens: chain([tokens[-1] + 1] * 2), 2, taps=(1,))
    assert [s.num_steps for s in walk(drafter, texts, taps)] == [5, 1, 0]
    assert not drafter.seen


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("is_tree", [False, True])
def test_the_steps_are_the_engines(random_target: Path, temperature: float, is_tree: bool) -> None:
    """The same drafts in an engine, whose drafter sees other companions and another order."""
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
    params = [
        SamplingParams(temperature=temperature, max_tokens=limit, ignore_eos=True, seed=seed)
        for seed, limit in enumerate((20, 2, 13))
    ]
    plain = m27quant.load(random_target).generate(prompts, params)
    truth = [[*prompt, *result.token_ids] for prompt, result in zip(prompts, plain, strict=True)]

    def say(tokens: list[int]) -> Proposal:
        (text,) = (t for t in truth if t[: len(tokens)] == tokens)
        lot = zlib.crc32(repr(tokens).encode())
        right = text[len(tokens) : len(tokens) + lot % 4]
        if not is_tree:
            return chain([*right, *(7 for _ in range(5 - len(right)))])
        parents = [-1, *range(1, len(right))] if right else []  # behind a wrong first guess
        return Proposal([(right or text)[0] ^ 1, *right], [-1, *parents])

    llm = m27quant.load(random_target, drafter=Scripted(say, 5))
    results = llm.generate(prompts, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    texts = [Text(t, len(p), len(p) + s.max_tokens) for t, p, s in zip(truth, prompts, params, strict=True)]
    walked = walk(Scripted(say, 5), texts, [None] * 3)
    for stats, result in zip(walked, results, strict=True):
        engine = result.stats.acceptance
        assert stats.c_k == engine.c_k
        assert (stats.num_steps, stats.num_accepted, stats.num_drafted) == (
            engine.num_steps, engine.num_accepted, engine.num_drafted,
        )  # fmt: skip
    assert total(walked).num_accepted > 5
    assert total(walked) != AcceptanceStats()


def test_repeated_ngrams() -> None:
    assert repeated_share([Text([1, 2, 3, 1, 2, 3, 1, 2], 3, 8)], n=3) == 3 / 5
    assert repeated_share([Text([1, 2, 3, 4], 1, 4), Text([1, 1, 1, 1, 1], 1, 5)], n=3) == (0 + 2 / 4) / 2
