"""Hidden states: the ones that the runtime computes, whatever a sample is batched with, computed or from a cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m27quant.drafters.samples import Sample, sample_of
from m27quant.drafters.states import TargetStates
from m27quant.errors import M27Error
from m27quant.runtime.probe import hidden_states_of, logits_of

TAPS = (0, 3, 1)


def samples(count: int, seed: int = 0) -> list[Sample]:
    chance = random.Random(seed)
    return [
        sample_of(str(i), [chance.randrange(256) for _ in range(chance.randint(1, 40))], [7, 8])
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def target(random_target: Path) -> Iterator[TargetStates]:
    states = TargetStates.open(random_target)
    yield states
    states.close()


def same(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for pair in zip(a, b, strict=True) for x, y in zip(*pair, strict=True)
    )


def test_they_are_the_models(target: TargetStates) -> None:
    for sample, (taps, final) in zip(samples(3), target.of(samples(3), TAPS), strict=True):
        assert taps.dtype == final.dtype == torch.bfloat16
        assert torch.equal(taps, hidden_states_of(target.model, sample.ids, TAPS))
        assert torch.equal(taps[:, : final.shape[1]], target.embed[sample.ids])
        torch.testing.assert_close(
            (final.float() @ target.head.float().T), logits_of(target.model, sample.ids), rtol=0, atol=0.05
        )


def test_a_sample_is_the_same_in_any_company(target: TargetStates, monkeypatch: pytest.MonkeyPatch) -> None:
    many = samples(9)
    together = target.of(many, TAPS)
    assert same(together, [target.of([sample], TAPS)[0] for sample in many])
    backwards = target.of(many[::-1], TAPS)[::-1]
    assert same(together, backwards)
    from dataclasses import replace

    monkeypatch.setattr(target.llm, "options", replace(target.llm.options, max_num_batched_tokens=50))
    assert same(together, target.of(many, TAPS))


def test_a_cache_changes_nothing_and_keeps_its_limit(
    target: TargetStates, random_target: Path, tmp_path: Path
) -> None:
    many = samples(8)
    plain = target.of(many, TAPS)
    size = 2 * sum(t.numel() + f.numel() for t, f in plain)
    for limit in (0, size // 2, size // 2, None, None):
        states = TargetStates.open(random_target, cache_folder=tmp_path / "cache", cache_bytes=limit)
        assert same(states.of(many[:5], TAPS), plain[:5])
        assert same(states.of(many[::-1], TAPS), plain[::-1])
        assert same(states.of(many, (2,)), target.of(many, (2,))), "other taps have another cache"
        files = list((tmp_path / "cache").glob("*/writer-0/states.bin"))
        of_taps = max(path.stat().st_size for path in files)
        states.close()
        assert limit is None or of_taps <= limit
        assert limit is None or not limit or of_taps > 0
    assert of_taps == size


def test_what_a_cache_has_is_not_computed(
    target: TargetStates, random_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = samples(4)
    states = TargetStates.open(random_target, cache_folder=tmp_path)
    states.of(many, TAPS)
    states.close()
    states = TargetStates.open(random_target, cache_folder=tmp_path)
    monkeypatch.setattr(states.model, "forward", None)
    assert same(states.of([*many, many[0]], TAPS), target.of([*many, many[0]], TAPS))
    other = TargetStates.open(random_target, cache_folder=tmp_path)  # beside the first: another writer
    monkeypatch.setattr(other.model, "forward", None)
    assert same(other.of(many, TAPS), target.of(many, TAPS))
    for opened in (states, other):
        opened.close()


@pytest.mark.parametrize("damage", ["bytes", "cut", "index", "torn"])
def test_a_damaged_cache_is_computed_again(
    target: TargetStates, random_target: Path, tmp_path: Path, damage: str
) -> None:
    many = samples(4)
    states = TargetStates.open(random_target, cache_folder=tmp_path)
    states.of(many[:2], TAPS)
    states.of(many, TAPS)
    states.close()
    (folder,) = tmp_path.glob("*/writer-0")
    data = (folder / "states.bin").read_bytes()
    if damage == "bytes":
        (folder / "states.bin").write_bytes(bytes([data[0] ^ 1]) + data[1:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        (folder / "states.bin").write_bytes(data[: len(data) // 2])
    elif damage == "index":
        lines = (folder / "index.jsonl").read_text()
        (folder / "index.jsonl").write_text("rubbish\n" + lines)
    else:
        with (folder / "index.jsonl").open("a") as file:
            file.write('{"crc": 1, "bo')
    for _ in range(2):
        states = TargetStates.open(random_target, cache_folder=tmp_path)
        assert same(states.of(many, TAPS), target.of(many, TAPS))
        states.close()


def test_what_the_target_does_not_have_is_refused(target: TargetStates) -> None:
    with pytest.raises(M27Error, match="0 \\(embeddings\\) to 4"):
        target.of(samples(1), (5,))
    with pytest.raises(M27Error, match="vocabulary of 256"):
        target.of([sample_of("x", [256], [1])], TAPS)
    with pytest.raises(M27Error, match="sample x has 0 tokens"):
        target.of([sample_of("x", [], [])], TAPS)
    with pytest.raises(M27Error, match=r"no tokenizer\.json"):
        _ = target.tokenizer
