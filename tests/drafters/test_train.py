"""Training: resumed to the bit, however it was stopped; nothing of a bad step kept; who may write where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import m27quant
from m27quant.drafters import eagle3, learn
from m27quant.errors import CheckpointError, Interrupted, OutputError, TrainingError, UsageError
from tests.drafters.conftest import SMALL
from tests.tolerance import TRAINING_RTOL

Train = Callable[..., m27quant.TrainResult]
KINDS = ("dflash", "eagle3")


@pytest.fixture
def train(target: Path, rows: Path, tmp_path: Path) -> Train:
    def run(kind: str = "dflash", name: str = "out", **changes: Any) -> m27quant.TrainResult:
        given = {"stop": lambda: None, "say": lambda line: None} | SMALL[kind] | changes
        data = given.pop("data", rows)
        return m27quant.train_drafter(kind, target, data, tmp_path / name, **given)

    return run


def steps_of(out: Path, *keys: str) -> list[tuple[Any, ...]]:
    """What the log has of each step, times left out."""
    entries = map(json.loads, (out / ".m27quant" / "log.jsonl").read_text().splitlines())
    wanted = keys or ("step", "loss", "position_loss", "accuracy", "c_k", "lr", "grad_norm", "tokens")
    return [tuple(e[key] for key in wanted) for e in entries if e["event"] == "step"]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def stop_after(count: int) -> Callable[[], None]:
    """A signal that comes before step `count`, counted from 1."""
    calls = iter(range(1, 1000))

    def stop() -> None:
        if next(calls) == count:
            raise Interrupted("stopped")

    return stop


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    kind: str, optimizer: str, train: Train, tmp_path: Path
) -> None:
    settings = {"optimizer": optimizer, "heldout": "0.2", "eval_every": 2}
    whole = train(kind, "whole", **settings)
    for count in (1, 3):
        with pytest.raises(Interrupted):
            train(kind, resume=True, stop=stop_after(count), **settings)
        assert not (tmp_path / "out" / "config.json").exists()
    parts = train(kind, resume=True, **settings)
    assert steps_of(tmp_path / "out") == steps_of(tmp_path / "whole")
    for name in ("model.safetensors", "config.json", "README.md", "training.svg"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert replace(parts, out=whole.out, elapsed_s=0) == replace(whole, elapsed_s=0)


def test_a_stop_loses_nothing(train: Train, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(stop=stop_after(3), save_every=1000)
    said: list[str] = []
    train(resume=True, save_every=1000, say=said.append)
    assert "resumed behind step 3 of 6" in said


@pytest.mark.parametrize("cache_size", [0, 2**20])
def test_states_from_the_cache_are_those_computed_again(
    train: Train, tmp_path: Path, cache_size: int
) -> None:
    train(name="some", cache_size=20_000)  # full after a few samples
    train(name="other", cache_size=cache_size)
    assert weights(tmp_path / "some") == weights(tmp_path / "other")
    assert not (tmp_path / "other" / ".m27quant" / "states").exists()


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_and_leaves_no_trace(
    wrong: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = learn.Learner._gradients

    def spoilt(self: learn.Learner, drawn: Any, step: int) -> Any:
        grads, sums = gradients(self, drawn, step)
        if step == 3 and wrong == "gradient":
            grads["fc.weight"][0, 0] = float("inf")
        elif step == 3:
            sums[1] = float("nan")
        return grads, sums

    train(name="whole")
    monkeypatch.setattr(learn.Learner, "_gradients", spoilt)
    with pytest.raises(TrainingError, match=f"step 4: the {wrong} is not finite"):
        train(save_every=2)
    monkeypatch.undo()
    assert [step for (step,) in steps_of(tmp_path / "out", "step")] == [1, 2, 3]
    said: list[str] = []
    train(resume=True, say=said.append)
    assert "resumed behind step 2 of 6" in said
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_is_a_larger_batch(kind: str, train: Train, tmp_path: Path) -> None:
    train(kind, "parts", batch_size=2, grad_accumulation=2, dtype="f32")
    train(kind, "whole", batch_size=4, grad_accumulation=1, dtype="f32")
    parts, whole = (steps_of(tmp_path / name, "loss", "grad_norm") for name in ("parts", "whole"))
    for a, b in zip(parts, whole, strict=True):
        assert a == pytest.approx(b, rel=TRAINING_RTOL)


def test_whose_folder_it_is(train: Train, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not empty, and not made by.*notes\.txt"):
        train(name="theirs", overwrite=True)
    first = train(steps=2)
    with pytest.raises(UsageError, match="already holds a finished drafter"):
        train(steps=2)
    again = train(steps=2, resume=True)
    assert again.was_complete
    assert replace(again, elapsed_s=0, was_complete=False) == replace(first, elapsed_s=0)
    with pytest.raises(UsageError, match="seed: 0 then, 5 now"):
        train(steps=2, resume=True, seed=5)
    (tmp_path / "out" / "own.txt").write_text("kept")
    before = weights(tmp_path / "out")
    train(steps=2, overwrite=True, seed=5)
    assert weights(tmp_path / "out") != before
    assert (tmp_path / "out" / "own.txt").read_text() == "kept"
    with pytest.raises(Interrupted):
        train(name="cut", stop=stop_after(1))
    with pytest.raises(UsageError, match="holds an unfinished run"):
        train(name="cut")
    with pytest.raises(UsageError, match="steps: 6 then, 7 now"):
        train(name="cut", resume=True, steps=7)


def test_blocks_of_two_sizes_have_all_positions(train: Train) -> None:
    assert len(train(steps=2, train_block_sizes=(2, 4)).accuracy) == 3


def test_other_data_is_refused(train: Train, tmp_path: Path, rows: Path) -> None:
    with pytest.raises(Interrupted):
        train(stop=stop_after(1))
    other = tmp_path / "other.jsonl"
    lines = rows.read_text().splitlines()
    other.write_text("\n".join([lines[0].replace("[", "[7, ", 1), *lines[1:]]))
    with pytest.raises(UsageError, match="data: "):
        train(resume=True, data=other)
    reordered = tmp_path / "same.jsonl"
    reordered.write_text(rows.read_text())
    train(resume=True, data=reordered)  # a copy is the same data


def test_a_damaged_state_is_refused(train: Train, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(stop=stop_after(2))
    path = tmp_path / "out" / ".m27quant" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        train(resume=True)


def test_out_may_not_lie_in_an_input(train: Train, target: Path) -> None:
    with pytest.raises(UsageError, match="lies in the input"):
        m27quant.train_drafter("dflash", target, target, target / "drafter")


def test_nothing_to_learn(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_token_ids": [1, 2, 3], "token_ids": []}\n')
    with pytest.raises(UsageError, match="nothing to learn"):
        train(data=path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_shorter_than_a_block(kind: str, train: Train, tmp_path: Path, rows: Path) -> None:
    """They are learned from as far as they go; nothing of them can be walked."""
    path = tmp_path / "short.jsonl"
    path.write_text(
        '{"prompt_token_ids": [1, 2], "token_ids": [3, 4]}\n{"prompt_token_ids": [1], "token_ids": [2]}\n'
    )
    found = train(kind, data=rows, heldout=str(path), steps=1).heldout
    assert found is not None
    assert (found["blocks"], found["tau"]) == (0, 1.0)
    with pytest.raises(UsageError, match="one sample cannot be both"):
        train(kind, "one", data=path, heldout="0.5")


def test_a_batch_without_a_token_of_the_vocabulary_changes_nothing(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eagle3, "_teacher", unknown_at_first(eagle3._teacher))
    said: list[str] = []
    result = train("eagle3", say=said.append, steps=6)
    assert "notice: step 1: no token of the batch can be drafted; nothing was learned" in said
    assert steps_of(tmp_path / "out", "step") == [(n,) for n in range(2, 7)]
    assert result.loss > 0


def unknown_at_first(teacher: Callable[..., Any]) -> Callable[..., Any]:
    """The target's first choices in the first batch are tokens that the draft vocabulary lacks."""
    calls = iter(range(1000))

    def spoilt(*arguments: Any) -> Any:
        logits, known = teacher(*arguments)
        return logits, known & (next(calls) > 0)

    return spoilt


def test_a_target_that_cannot_be_loaded_leaves_no_folder(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="activations"):
        train(activations="fp2")
    assert not (tmp_path / "out").exists()
