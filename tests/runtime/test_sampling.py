"""Sampling against the distributions' definitions, and the one draw of each position."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m27quant.errors import UsageError
from m27quant.runtime.generation import GenerationConfig, SamplingParams
from m27quant.runtime.sampling import NO_CHOICE, Row, choose, log_probabilities, probabilities, uniform

NEUTRAL = GenerationConfig(
    defaults=SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0),
    eos_token_ids=(0,),
)


def row(tokens: list[int] | None = None, num_prompt: int | None = None, seed: int = 0, **params: Any) -> Row:
    complete = NEUTRAL.complete(SamplingParams(**params), 10_000)
    tokens = [1] if tokens is None else tokens
    return Row(
        complete, seed, tokens, len(tokens) if num_prompt is None else num_prompt, NEUTRAL.stop_ids(complete)
    )


def defined(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """Temperature, then top-k, then top-p, then min-p, each on what the one before left; plain loops."""
    assert p.temperature is not None
    assert p.top_k is not None
    assert p.top_p is not None
    assert p.min_p is not None
    prob = torch.softmax(logits.double() / p.temperature, 0)
    order = sorted(range(len(prob)), key=lambda i: (-float(logits[i]), i))
    if p.top_k:
        order = order[: p.top_k]
    total = sum(float(prob[i]) for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= p.top_p * total and p.top_p < 1:
            break
        kept.append(i)
        mass += float(prob[i])
    kept = [i for i in kept if float(prob[i]) >= p.min_p * float(prob[kept[0]])]
    result = torch.zeros_like(prob)
    result[kept] = prob[kept] / prob[kept].sum()
    return result


def dense(logits: torch.Tensor, at: Row) -> torch.Tensor:
    ids, prob = probabilities(logits, at)
    assert len(set(ids.tolist())) == len(ids)
    return torch.zeros(len(logits), dtype=torch.float64).index_put((ids,), prob)


@settings(max_examples=60)
@given(
    st.integers(2, 3000),
    st.floats(0.05, 3.0),
    st.sampled_from([0, 1, 2, 7, 40, 5000]),
    st.sampled_from([1.0, 0.999, 0.95, 0.5, 0.01]),
    st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    st.integers(0, 100),
    st.booleans(),
)
def test_what_is_drawn_from_is_the_definition(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, ties: bool
) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 4
    if ties:
        logits = logits.round()
    at = row(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.allclose(dense(logits, at), defined(logits, at.params), atol=1e-9)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    params = {"temperature": 0.7, "top_k": 4}
    count = 8000
    drawn = [choose(logits[None], [row([0] * (i % 50 + 1), seed=i // 50, **params)])[0] for i in range(count)]
    frequency = torch.bincount(torch.tensor(drawn), minlength=5) / count
    expected = defined(logits, row(**params).params)
    assert float((frequency - expected).abs().sum()) / 2 < 3 * math.sqrt(5 / count)
    assert frequency[3] == 0


def test_a_positions_number_is_uniform_and_its_own() -> None:
    drawn = [[uniform(seed, position) for position in range(300)] for seed in range(100)]
    numbers = torch.tensor(drawn, dtype=torch.float64)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert len(numbers.unique()) == numbers.numel()
    deciles = torch.histc(numbers, 10, 0, 1) / numbers.numel()
    assert float((deciles - 0.1).abs().max()) < 0.01
    centred = numbers - numbers.mean()
    along = (centred[:, 1:] * centred[:, :-1]).mean() / centred.var()
    across = (centred[1:] * centred[:-1]).mean() / centred.var()
    assert max(abs(float(along)), abs(float(across))) < 0.02
    assert uniform(-5, 3) != uniform(5, 3)


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [5.0, 5.0, 0.0, 0.0]])
    assert choose(logits, [row(temperature=0.0)] * 2) == [1, 0]
    assert choose(logits, [row(top_k=1)] * 2) == [1, 0]
    assert choose(logits[:0], []) == []


def test_penalties() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.0, 0.5])
    tokens = [0, 1, 2, 2, 3]  # prompt 0 1 2, output 2 3
    at = row(tokens, 3, temperature=1.0, repetition_penalty=2.0)
    assert torch.allclose(
        dense(logits, at), torch.softmax(torch.tensor([1.0, -4.0, 0.5, 0.0, 0.5]).double(), 0)
    )
    at = row(tokens, 3, temperature=1.0, presence_penalty=0.5)
    assert torch.allclose(dense(logits, at), torch.softmax(torch.tensor([2, -2, 0.5, -0.5, 0.5]).double(), 0))
    at = row([*tokens, 2], 3, temperature=1.0, frequency_penalty=0.5, presence_penalty=0.25)
    expected = torch.softmax(torch.tensor([2, -2, 1 - 1.25, -0.75, 0.5]).double(), 0)
    assert torch.allclose(dense(logits, at), expected)
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0, 0.5], "the caller's logits stay"
    assert choose(logits[None], [row(tokens, 3, temperature=0.0, repetition_penalty=8.0)]) == [4]


def test_what_stops_is_not_chosen_before_min_tokens() -> None:
    logits = torch.tensor([9.0, 7.0, 8.0, 7.0])
    settings: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (2,)}
    assert choose(logits[None], [row([5, 6], 1, **settings)]) == [1]
    assert choose(logits[None], [row([5, 6, 7], 1, **settings)]) == [0]
    drawn = {
        choose(logits[None], [row([5], 1, seed=s, temperature=1.0, min_tokens=1)])[0] for s in range(200)
    }
    assert drawn == {1, 2, 3}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_give_no_choice(value: float) -> None:
    logits = torch.zeros(2, 5)
    logits[0, 3] = value
    for params in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.5}):
        assert choose(logits, [row(**params)] * 2)[0] == NO_CHOICE
        assert choose(logits, [row(**params)] * 2)[1] != NO_CHOICE
    assert choose(torch.full((1, 4), -math.inf), [row()]) == [NO_CHOICE]


def test_settings_that_leave_nothing_give_no_choice() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0]])
    all_stop: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": (0, 1, 2)}
    for temperature in (0.0, 1.0):
        assert choose(logits, [row([5], 1, temperature=temperature, **all_stop)]) == [NO_CHOICE]
        assert choose(logits, [row([5], 1, temperature=temperature, min_tokens=1)])[0] in (1, 2)
        unbounded = row([5, 0], 1, temperature=temperature, presence_penalty=-1e300)
        assert choose(logits, [unbounded]) == [NO_CHOICE]


def test_a_token_without_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m27quant.runtime.sampling.uniform", lambda seed, position: 1 - 2.0**-53)
    logits = torch.zeros(1, 50)
    assert choose(logits, [row([5], 1, temperature=1.0, min_tokens=1, stop_token_ids=(49,))]) == [48]


def test_log_probabilities_are_of_the_model_itself() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, -1.0])
    expected = torch.log_softmax(logits.double(), 0)
    chosen, top = log_probabilities(logits, 3, 3)
    assert chosen == pytest.approx(float(expected[3]))
    assert [i for i, _ in top] == [1, 2, 0]
    assert [p for _, p in top] == pytest.approx(expected[[1, 2, 0]].tolist())
    assert log_probabilities(logits, 0, 0)[1] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", "hot"), ("top_p", 0.0), ("top_p", 1.1),
        ("top_k", -1), ("top_k", 2.0), ("min_p", 2), ("repetition_penalty", 0.0), ("max_tokens", 0),
        ("max_tokens", True), ("min_tokens", -1), ("logprobs", -1), ("stop", ("",)), ("stop", (3,)),
        ("stop_token_ids", (-1,)), ("seed", 2**65), ("frequency_penalty", math.inf),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        SamplingParams(**{field: value})


def test_a_stop_string_alone_is_one() -> None:
    assert SamplingParams(stop="abc").stop_strings == ("abc",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")  # type: ignore[arg-type]
