"""The engine where it is easily wrong: ends within drafts, a full cache, refusals, cancellation, reuse."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from m27quant.errors import UsageError
from m27quant.runtime.api import LLM, GenerateResult
from m27quant.runtime.generation import SamplingParams
from m27quant.runtime.speculative.proposal import DraftRequest, Proposal, chain
from tests.runtime.engines import GuessingDrafter, Loaded

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def tiny(tiny_nvfp4: Path) -> Loaded:
    """The trained model: it has a tokenizer, text, and ends."""
    return Loaded(tiny_nvfp4)


@pytest.fixture(scope="module")
def texts(repository: Path) -> list[str]:
    heldout = (repository / "examples/tiny-m27/heldout.txt").read_text()
    return [heldout[at : at + 60 + at % 90] for at in range(0, 64_000, 1000)]


class Oracle:
    """Drafts exactly what comes next, as many tokens at a time as the engine takes."""

    taps = ()

    def __init__(self, llm: LLM, num_draft_tokens: int = 7) -> None:
        self.num_draft_tokens = self.max_depth = num_draft_tokens
        self._llm = llm
        self.most_wanted: list[int] = []

    def propose(self, requests: Any) -> list[Proposal]:
        return [self._propose(request) for request in requests]

    def forget(self, sequence: int) -> None:
        pass

    def _propose(self, request: DraftRequest) -> Proposal:
        self.most_wanted.append(request.max_tokens)
        params = SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
        return chain(self._llm.generate(request.tokens, params)[0].token_ids)


def with_oracle(loaded: Loaded, **options: Any) -> tuple[LLM, Oracle]:
    oracle = Oracle(loaded.engine())
    return loaded.engine(drafter=oracle, **options), oracle


def same(a: GenerateResult, b: GenerateResult) -> None:
    assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)


def test_right_drafts_are_all_accepted(tiny: Loaded) -> None:
    llm, _ = with_oracle(tiny)
    plain = tiny.engine().generate("def main():\n", GREEDY)[0]
    found = llm.generate("def main():\n", GREEDY)[0]
    same(found, plain)
    steps = found.stats.acceptance
    # 24 tokens: one from the prompt, 8 from each of two steps, 7 from the last, whose budget ends there
    assert (steps.num_steps, steps.num_accepted, steps.num_drafted) == (3, 20, 20)
    assert steps.tau == pytest.approx(1 + 20 / 3)
    assert steps.c_k[0] == 1
    assert plain.stats.acceptance.num_steps == 23
    assert plain.stats.acceptance.tau == 1


def test_no_draft_is_asked_for_beyond_the_last_token(tiny: Loaded) -> None:
    llm, oracle = with_oracle(tiny)
    llm.generate("import os\n", SamplingParams(temperature=0.0, max_tokens=10))
    # one token from the prompt, eight from the first step; the tenth needs no draft
    assert oracle.most_wanted == [7]


def test_one_token_is_an_answer(tiny: Loaded) -> None:
    llm, oracle = with_oracle(tiny)
    for drafting in (llm, tiny.engine()):
        found = drafting.generate("class A:\n", SamplingParams(temperature=0.0, max_tokens=1))[0]
        assert (len(found.token_ids), found.finish_reason) == (1, "length")
        assert found.usage["completion_tokens"] == 1
    assert not oracle.most_wanted


def test_an_end_token_within_a_draft_ends_the_output_there(tiny: Loaded) -> None:
    plain = tiny.engine().generate("def main():\n", GREEDY)[0]
    for at in (1, 2, 5, 8, 9, 11):
        stop = plain.token_ids[at]
        params = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=(stop,))
        llm, _ = with_oracle(tiny)
        found = llm.generate("def main():\n", params)[0]
        assert found.finish_reason == "stop"
        assert found.token_ids == plain.token_ids[: plain.token_ids.index(stop) + 1]
        same(found, tiny.engine().generate("def main():\n", params)[0])
        assert llm.engine.scheduler.blocks.num_free == 64


def test_all_end_tokens_of_the_generation_config_count(tiny: Loaded) -> None:
    """And `ignore_eos` lets them pass, while a request's own still count."""
    llm = tiny.engine()
    ended = SamplingParams(temperature=0.0, max_tokens=400)
    prompt = "]~!b[]~b]system\nYou write Python.[e~[\n]~b]user\nWrite a function.[e~[\n]~b]ai\n"
    found = llm.generate(prompt, ended)[0]
    assert llm.generation.eos_token_ids == (2040,)
    if found.finish_reason == "stop":
        assert found.token_ids[-1] == 2040
    first = llm.generate("x = 1\n", GREEDY)[0].token_ids[0]
    config = llm.generation
    object.__setattr__(config, "eos_token_ids", (2040, first))
    try:
        assert llm.generate("x = 1\n", GREEDY)[0].token_ids == [first]
        ignoring = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        assert len(llm.generate("x = 1\n", ignoring)[0].token_ids) == 5
        own = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, stop_token_ids=(first,))
        assert llm.generate("x = 1\n", own)[0].token_ids == [first]
    finally:
        object.__setattr__(config, "eos_token_ids", (2040,))


@pytest.mark.parametrize("drafting", [False, True])
def test_a_stop_string_ends_the_text_wherever_tokens_and_drafts_end(tiny: Loaded, drafting: bool) -> None:
    plain = tiny.engine().generate("def main():\n", GREEDY)[0]
    assert len(plain.text) > 40
    llm = with_oracle(tiny)[0] if drafting else tiny.engine()
    for begin in (0, 7, 16, 25):
        for length in (1, 4, 9):
            stop = plain.text[begin : begin + length]
            params = SamplingParams(temperature=0.0, max_tokens=24, stop=("never there", stop))
            events = list(llm.stream("def main():\n", params))
            found = events[-1].result
            assert found is not None
            assert found.finish_reason == "stop"
            assert found.text == plain.text[: plain.text.find(stop)]
            assert "".join(e.text for e in events) == found.text, "nothing is shown that is taken back"
            assert found.token_ids == plain.token_ids[: len(found.token_ids)]
            assert [t for e in events for t in e.token_ids] == found.token_ids


def test_a_stop_string_that_does_not_come_is_not_held_back_for_ever(tiny: Loaded) -> None:
    plain = tiny.engine().generate("def main():\n", GREEDY)[0]
    never = plain.text[-6:] + "\0"
    found = tiny.engine().generate(
        "def main():\n", SamplingParams(temperature=0.0, max_tokens=24, stop=never)
    )[0]
    same(found, plain)


@pytest.mark.parametrize("drafting", [False, True])
def test_a_full_cache_ends_one_output_and_no_other(tiny: Loaded, drafting: bool) -> None:
    """32 positions in all: with the token behind the last one, 33 tokens; at every offset to a block's edge."""
    for length in (15, 16, 17):
        ids = list(range(100, 100 + length))
        options: dict[str, Any] = {"num_blocks": 8, "block_size": 4}
        llm = with_oracle(tiny, **options)[0] if drafting else tiny.engine(**options)
        long = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
        found, other = llm.generate([ids, ids[:5]], [long, GREEDY])
        assert (found.finish_reason, len(found.token_ids)) == ("length", 33 - length)
        same(other, tiny.engine().generate(ids[:5], GREEDY)[0])
        plenty = tiny.engine().generate(
            ids, SamplingParams(temperature=0.0, max_tokens=33 - length, ignore_eos=True)
        )
        assert found.token_ids == plenty[0].token_ids


def test_what_cannot_be_answered_is_refused_by_itself(tiny: Loaded) -> None:
    llm = tiny.engine(num_blocks=2, block_size=16)
    results = llm.generate(["", list(range(33)), list(range(32)), "ok = "], GREEDY)
    assert [r.finish_reason for r in results] == ["error", "error", "length", "length"]
    assert "empty" in str(results[0].error)
    assert "33" in str(results[1].error)
    assert len(results[2].token_ids) == 1
    assert results[3].error is None
    assert results[0].token_ids == results[1].token_ids == []
    assert llm.engine.scheduler.is_idle


@pytest.mark.parametrize(
    ("prompt", "says"), [([2048], "0 to 2047"), ([-1], "0 to 2047"), ([True], "True"), (["a", 3], "integer"),
                         ("\ud800", "Unicode|surrogate")],
)  # fmt: skip
def test_prompts_that_are_none_are_refused_before_anything_runs(tiny: Loaded, prompt: Any, says: str) -> None:
    llm = tiny.engine()
    for prompts in ([prompt, "fine"], ["fine", prompt]):
        with pytest.raises(UsageError, match=says):
            llm.generate(prompts, GREEDY)
        assert llm.engine.scheduler.is_idle


def test_params_for_each_prompt_or_for_all(tiny: Loaded) -> None:
    llm = tiny.engine()
    with pytest.raises(UsageError, match="2 sampling params for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])
    with pytest.raises(UsageError, match="vocabulary has 2048"):
        llm.generate("a", SamplingParams(stop_token_ids=(2048,)))
    assert llm.generate([], GREEDY) == []


def test_sixty_four_at_once_with_preemption(tiny: Loaded, texts: list[str]) -> None:
    """A cache for a tenth of them: everyone is answered as alone, and some were preempted on the way."""
    settings = [
        GREEDY if index % 3 else SamplingParams(max_tokens=10 + index % 20, seed=index) for index in range(64)
    ]
    roomy = tiny.engine(num_blocks=1024).generate(texts, settings)
    for index in range(0, 64, 7):
        same(roomy[index], tiny.engine().generate(texts[index], settings[index])[0])
    drafter = GuessingDrafter(2048, seed=4)
    llm = tiny.engine(num_blocks=24, max_num_seqs=64, max_num_batched_tokens=96, drafter=drafter)
    found = llm.generate(texts, settings)
    for a, b in zip(found, roomy, strict=True):
        same(a, b)
    assert not any(r.stats.num_preemptions for r in roomy)
    assert sum(r.stats.num_preemptions for r in found) > 5
    assert llm.engine.scheduler.blocks.num_free == 24
    assert {len(r.token_ids) for r in found} != {24}


def test_cancelling_in_the_middle_leaves_the_others_alone(tiny: Loaded, texts: list[str]) -> None:
    alone = [tiny.engine().generate(t, GREEDY)[0] for t in texts[:4]]
    llm = tiny.engine(num_blocks=40, drafter=GuessingDrafter(2048, seed=1, taps=(0, 3)))
    requests = [llm.submit(t, GREEDY) for t in texts[:4]]
    for _ in range(6):
        llm.step()
    llm.cancel(requests[1])
    llm.cancel(requests[1])
    while not llm.engine.scheduler.is_idle:
        llm.step()
    results = [llm.result(r) for r in requests]
    for index in (0, 2, 3):
        same(results[index], alone[index])
    assert results[1].finish_reason == "cancelled"
    assert 0 < len(results[1].token_ids) < 24
    assert results[1].token_ids == alone[1].token_ids[: len(results[1].token_ids)]
    assert llm.engine.scheduler.blocks.num_free == 40


def test_leaving_a_stream_cancels_it(tiny: Loaded) -> None:
    llm = tiny.engine()
    for _ in llm.stream(["a = ", "b = "], GREEDY):
        break
    assert llm.engine.scheduler.is_idle
    assert llm.engine.scheduler.blocks.num_free == 64


def test_two_streams_in_turns_and_one_that_is_never_begun(tiny: Loaded) -> None:
    llm = tiny.engine()
    expected = llm.generate(["a = ", "b = "], GREEDY)
    llm.stream("c = ", GREEDY)
    streams = [llm.stream(prompt, GREEDY) for prompt in ("a = ", "b = ")]
    texts = ["", ""]
    for events in itertools.zip_longest(*streams):
        for index, event in enumerate(events):
            texts[index] += event.text if event else ""
    assert texts == [r.text for r in expected]
    assert llm.engine.scheduler.is_idle


@pytest.mark.parametrize("length", [31, 32, 33, 48])
def test_a_beginning_in_common_is_computed_once(tiny: Loaded, length: int) -> None:
    ids = list(range(200, 200 + length))
    llm = tiny.engine()
    first = llm.generate(ids, GREEDY)[0]
    computed = llm.engine.totals.num_prefill_tokens
    again = llm.generate([ids, [*ids, 7]], GREEDY)
    same(again[0], first)
    same(again[1], tiny.engine().generate([*ids, 7], GREEDY)[0])
    whole_blocks = (length - 1) // 16 * 16
    assert [r.stats.num_reused_tokens for r in again] == [whole_blocks, length // 16 * 16]
    assert (
        llm.engine.totals.num_prefill_tokens - computed == 2 * length + 1 - whole_blocks - length // 16 * 16
    )
    assert llm.generate([1, *ids], GREEDY)[0].stats.num_reused_tokens == 0


def test_nan_in_one_output_is_that_ones_error(tiny: Loaded) -> None:
    embedding = tiny.model.embedding
    tiny.model.embedding = embedding.clone()
    tiny.model.embedding[77] = torch.nan
    try:
        good, bad = tiny.engine().generate([[5, 6, 7], [5, 77, 7]], GREEDY)
    finally:
        tiny.model.embedding = embedding
    assert bad.finish_reason == "error"
    assert "NaN" in str(bad.error)
    assert bad.token_ids == []
    same(good, tiny.engine().generate([5, 6, 7], GREEDY)[0])


def test_a_drafter_that_answers_nonsense_is_a_fault_of_its_code(tiny: Loaded) -> None:
    class Wrong(GuessingDrafter):
        def propose(self, requests: Any) -> list[Proposal]:
            return [Proposal([1, 2], [1, 0])] * len(requests)

    with pytest.raises(ValueError, match="parent"):
        tiny.engine(drafter=Wrong(2048)).generate("a = 1\n", GREEDY)


def test_every_committed_position_is_tapped_with_the_models_own_states(tiny: Loaded) -> None:
    """Whatever was accepted, preempted or reused: what the drafter saw is what one forward pass gives."""
    from tests.runtime.engines import states_of

    seen: dict[int, list[torch.Tensor]] = {}

    class Keeping(GuessingDrafter):
        def forget(self, sequence: int) -> None:
            seen[sequence] = self.tapped.pop(sequence, [])

    prompts = [[*range(30, 60)], [*range(30, 62), 5], [9, 8, 7]]
    known = [[*p, *tiny.engine().generate(p, GREEDY)[0].token_ids] for p in prompts]

    def truth(tokens: list[int]) -> list[int]:
        return next((k[len(tokens) :] for k in known if k[: len(tokens)] == tokens), [])

    drafter = Keeping(2048, truth, seed=2, taps=(3, 0, 8))
    llm = tiny.engine(num_blocks=9, drafter=drafter, max_num_batched_tokens=16)
    results = llm.generate(prompts, GREEDY)
    assert sum(r.stats.acceptance.num_accepted for r in results) > 10
    for number, ids in enumerate(known):
        taps = torch.cat(seen[number])
        hidden = states_of(tiny, torch.tensor(ids)).hidden[[3, 0, 8]]
        expected = hidden.transpose(0, 1).flatten(1)[: len(taps)]
        assert len(taps) >= len(ids) - 10
        assert torch.equal(taps, expected)
