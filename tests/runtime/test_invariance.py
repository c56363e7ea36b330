"""Whatever runs beside a request, however it is cut, preempted, drafted: its output is what it is alone, to the bit."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m27quant import quantize_checkpoint
from m27quant.runtime.api import GenerateResult
from m27quant.runtime.generation import SamplingParams
from tests.checkpoints import Shape, write_checkpoint, write_rows
from tests.runtime.engines import GuessingDrafter, Loaded

VOCAB = 64
SHAPE = Shape(vocab_size=VOCAB)
FORMS: dict[str, dict[str, Any]] = {
    "w4a16": {"activations": "bf16"},
    "w4a4": {"activations": "nvfp4"},
    "bf16-kv": {"kv_cache_dtype": "bf16"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("invariance")
    source = write_checkpoint(home / "fp8", SHAPE)
    rows = write_rows(home / "rows.jsonl", vocab_size=VOCAB)
    quantize_checkpoint(str(source), home / "nvfp4", dataset=str(rows))
    return {"fp8": source, "nvfp4": home / "nvfp4"}


@pytest.fixture(scope="module", params=[*FORMS, "fp8-source"])
def loaded(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Loaded:
    if request.param == "fp8-source":
        return Loaded(folders["fp8"])
    return Loaded(folders["nvfp4"], **FORMS[request.param])


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    params: SamplingParams


@st.composite
def requests(draw: Any) -> Request:
    beginning = draw(st.sampled_from([(), (3, 1, 4, 1, 5, 9, 2, 6, 5), tuple(range(20))]))
    own = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12))
    params = draw(
        st.sampled_from([
            {"temperature": 0.0},
            {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
            {"temperature": 1.0, "seed": 7},
            {"temperature": 0.7, "top_k": 8, "seed": 8},
            {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02, "frequency_penalty": 0.4, "seed": 9},
            {"temperature": 1.0, "seed": 3, "stop_token_ids": (5, 11, 17, 23, 29), "min_tokens": 3, "logprobs": 2},
        ])
    )  # fmt: skip
    return Request((*beginning, *own), SamplingParams(max_tokens=draw(st.integers(1, 14)), **params))


_ALONE: dict[tuple[int, Request], GenerateResult] = {}


def alone(loaded: Loaded, request: Request) -> GenerateResult:
    """The request in a fresh engine, nothing beside it, its prompt in one piece, token by token."""
    key = (id(loaded), request)
    if key not in _ALONE:
        _ALONE[key] = loaded.engine().generate(request.prompt, request.params)[0]
        assert _ALONE[key].finish_reason in ("length", "stop")
    return _ALONE[key]


def what_matters(result: GenerateResult) -> tuple[Any, ...]:
    return result.token_ids, result.finish_reason, result.logprobs


@settings(max_examples=12)
@given(
    st.lists(requests(), min_size=1, max_size=6),
    st.sampled_from([1, 3, 8, 64]),
    st.sampled_from([(12, 4), (5, 16), (40, 4)]),
    st.sampled_from(["none", "random", "tree", "chain"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_every_request_gets_what_it_gets_alone(
    loaded: Loaded,
    mix: list[Request],
    max_num_batched_tokens: int,
    cache: tuple[int, int],
    drafts: str,
    prefix_caching: bool,
    seed: int,
) -> None:
    expected = [alone(loaded, request) for request in mix]
    known = [[*r.prompt, *e.token_ids] for r, e in zip(mix, expected, strict=True)]

    def truth(tokens: list[int]) -> list[int]:
        if drafts == "random":
            return []
        return next((k[len(tokens) :] for k in known if k[: len(tokens)] == tokens), [])

    drafter = None
    if drafts != "none":
        drafter = GuessingDrafter(VOCAB, truth, seed=seed, chain=drafts == "chain", taps=(0, 2, 1))
    num_blocks, block_size = cache
    engine = loaded.engine(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=random.Random(seed).randint(1, 6),
        drafter=drafter,
        prefix_caching=prefix_caching,
    )
    found = engine.generate([r.prompt for r in mix], [r.params for r in mix])
    assert [what_matters(r) for r in found] == [what_matters(r) for r in expected]
    blocks = engine.engine.scheduler.blocks
    assert blocks.num_free == num_blocks, "every block was given back"
