"""A few cases of the fuzzer, and that it would notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.verify_quick import SECRET, Fuzz


def test_a_few_cases(tmp_path: Path) -> None:
    fuzz = Fuzz(tmp_path, seed=11)
    fuzz.run(150)
    assert fuzz.outcomes["passed"]
    assert fuzz.outcomes["failed"] > fuzz.outcomes["passed"]


def test_it_notices_a_file_that_is_opened_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz = Fuzz(tmp_path, seed=11)
    honest = fuzz._verify

    def careless(drafter: Path | None) -> str:
        (fuzz.good / SECRET).read_bytes()
        return honest(drafter)

    monkeypatch.setattr(fuzz, "_verify", careless)
    with pytest.raises(AssertionError, match=SECRET):
        fuzz.case()


def test_it_notices_another_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz = Fuzz(tmp_path, seed=11)

    def broken(*args: object, **kwargs: object) -> object:
        raise KeyError("weight_map")

    monkeypatch.setattr("tests.fuzz.verify_quick.verify_checkpoint", broken)
    with pytest.raises(KeyError):
        fuzz.case()
