"""generation_config.json: its values are the defaults, its ends end, and what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import CheckpointError
from m27quant.runtime.generation import SamplingParams, derived_seed, read_generation_config

OFFICIAL = {"bos_token_id": 200019, "do_sample": True, "eos_token_id": 200020, "temperature": 1.0, "top_k": 40,
            "top_p": 0.95}  # fmt: skip


def read(folder: Path, content: Any, tokenizer: Tokenizer | None = None) -> Any:
    if content is not None:
        (folder / "generation_config.json").write_text(json.dumps(content))
    return read_generation_config(folder, 200064, tokenizer)


def test_the_official_values_are_the_defaults(tmp_path: Path) -> None:
    found = read(tmp_path, OFFICIAL)
    assert found.eos_token_ids == (200020,)
    complete = found.complete(SamplingParams(temperature=0.5), 200064)
    assert (complete.temperature, complete.top_k, complete.top_p, complete.min_p) == (0.5, 40, 0.95, 0.0)
    assert complete.max_tokens is None
    assert found.stop_ids(SamplingParams(stop_token_ids=(7,))) == {7, 200020}
    assert found.stop_ids(SamplingParams(ignore_eos=True)) == set()
    assert not found.notices


@pytest.mark.parametrize(
    ("content", "temperature", "ends"),
    [
        ({"eos_token_id": [5, 6]}, 0.0, (5, 6)),
        ({"eos_token_id": 5, "temperature": 0.7}, 0.7, (5,)),
        ({"eos_token_id": 5, "temperature": 0.7, "do_sample": False}, 0.0, (5,)),
        ({"eos_token_id": 5, "do_sample": True}, 1.0, (5,)),
        ({"eos_token_id": 5, "top_k": None, "max_new_tokens": 9}, 0.0, (5,)),
    ],
)
def test_what_is_left_out(tmp_path: Path, content: Any, temperature: float, ends: tuple[int, ...]) -> None:
    found = read(tmp_path, content)
    complete = found.complete(SamplingParams(), 200064)
    assert (complete.temperature, found.eos_token_ids) == (temperature, ends)
    assert (complete.top_k, complete.top_p, complete.repetition_penalty) == (0, 1.0, 1.0)
    assert complete.max_tokens == content.get("max_new_tokens")


def test_without_an_end_the_tokenizers_is_taken_and_said(tmp_path: Path, repository: Path) -> None:
    found = read(tmp_path, None)
    assert found.eos_token_ids == ()
    assert "nothing but max_tokens" in found.notices[0]
    tokenizer = Tokenizer(repository / "examples/tiny-m27")
    found = read(tmp_path, {"temperature": 1.0}, tokenizer)
    assert found.eos_token_ids == (2040,)
    assert "2040" in found.notices[0]


@pytest.mark.parametrize(
    "content", [{"eos_token_id": 200064}, {"eos_token_id": "5"}, {"eos_token_id": [5, -1]}, {"eos_token_id": True},
                {"top_p": 7}, {"temperature": "hot"}, {"top_k": 1.5}, [1]],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_files_name(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read(tmp_path, content)


def test_requests_without_a_seed_get_different_ones() -> None:
    seeds = {derived_seed(seed, number) for seed in range(10) for number in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)
