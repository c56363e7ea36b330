"""What models write: figures by hand, and the same divergence points whichever of two models could write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m27quant import evaluate
from m27quant.evaluation import texts
from m27quant.evaluation.health import share_of, text_health
from m27quant.evaluation.statistics import sign_flip_p
from m27quant.evaluation.texts import Row, measure_texts
from m27quant.evaluation.tool_prompts import TOOLS
from m27quant.evaluation.writing import Prompt, Unwritten, Written, make_prompts, write
from m27quant.report.evaluation_page import render
from m27quant.runtime.api import GenerateResult
from tests.evaluation.conftest import CPU, PLAIN, Files, Models
from tests.evaluation.test_evaluate import broken

TOKENS = 10


def answer(text: str, token_ids: list[int]) -> GenerateResult:
    return GenerateResult(
        index=0, text=text, token_ids=token_ids, finish_reason="stop", error=None, logprobs=None,
        num_prompt_tokens=1, seed=0, stats=None,  # type: ignore[arg-type]  # no figure of speed is read
    )  # fmt: skip


def test_health_of_texts_by_hand() -> None:
    call = '<minimax:tool_call><invoke name="search"><parameter name="query">x</parameter></invoke></minimax:tool_call>'
    written = Written(
        (Prompt([1]), Prompt([1]), Prompt([1], TOOLS), Prompt([1], TOOLS)),
        (
            answer("see README. md and os. path", list(range(10))),  # 2 of 6 words, 0 of 3 8-grams
            answer("a\N{REPLACEMENT CHARACTER}b c", [1, 2] * 10),  # 1 of 5 characters, 11 of 13 8-grams
            answer(call, [3]),
            answer("no", []),
        ),
    )
    found = text_health(written)
    words, characters = 6 + 2 + 3 + 1, 27 + 5 + len(call) + 2
    assert found["num_texts"] == 4
    assert found["spurious_spaces"]["value"] == pytest.approx(2 / words)
    assert found["repetition"]["value"] == pytest.approx(11 / 16)
    assert found["broken_characters"]["value"] == pytest.approx(1 / characters)
    assert (found["num_tool_prompts"], found["valid_tool_calls"]["value"]) == (2, 0.5)
    assert found["repetition"]["low"] <= 11 / 16 <= found["repetition"]["high"]


def test_shares_have_wilsons_interval() -> None:
    """Against the defining equation: |share - p| = z sqrt(p (1 - p) / n) at both ends."""
    for true, n in ((0, 8), (8, 8), (3, 10), (499, 500)):
        found = share_of([i < true for i in range(n)])
        assert found.value == true / n
        for end in {found.low, found.high} - {0.0, 1.0}:
            assert abs(true / n - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** 0.5, rel=1e-5)
    assert share_of([False] * 8).low == 0
    assert share_of([True] * 8).high == 1


def test_one_that_does_not_fit_changes_nothing(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, nvfp4 = models
    windows = torch.randint(256, (16, 10), generator=torch.Generator().manual_seed(1))
    prompts = make_prompts(list(windows), None, 16)
    rows = [Row("a", "same", reference, PLAIN), Row("b", "nvfp4", nvfp4, PLAIN)]
    full = {"reference": True, "same": True, "nvfp4": True}

    def measured(**fits: bool) -> Any:
        room = full | fits

        def writing(source: Any, *args: Any, **options: Any) -> Written | Unwritten:
            name = "nvfp4" if source is nvfp4 else "reference" if options["precision"] is None else "same"
            return write(source, *args, **options) if room[name] else Unwritten("needs more memory")

        monkeypatch.setattr(texts, "write", writing)
        return measure_texts(reference, rows, prompts, max_tokens=TOKENS, device=CPU)

    every = measured()
    points = every.greedy[1]["points"]
    assert len(set(points)) > 3
    assert every.greedy[1]["compared_by"] == "both texts"
    assert every.greedy[1]["tokens"]["value"] == pytest.approx(sum(points) / 16)
    (pair,) = every.pairs
    assert (pair.a, pair.b, pair.metric) == ("same", "nvfp4", "greedy")
    same = every.greedy[0]["points"]
    assert pair.difference == pytest.approx((sum(same) - sum(points)) / 16)
    differences = torch.tensor(same, dtype=torch.float64) - torch.tensor(points)
    assert pair.p == sign_flip_p(differences)

    small = measured(reference=False)
    assert small.greedy[1]["points"] == points
    assert small.greedy[1]["compared_by"] == "candidate's text"
    assert small.reference_health == {"not_measured": "needs more memory"}
    assert small.health == every.health

    large = measured(nvfp4=False)
    assert large.greedy[1]["points"] == points
    assert large.greedy[1]["compared_by"] == "reference's text"
    assert large.health[1] == {"not_measured": "needs more memory"}

    none = measured(reference=False, nvfp4=False)
    assert none.greedy[1] == {"not_measured": "needs more memory"}
    assert none.greedy[0]["compared_by"] == "candidate's text"
    assert none.pairs == ()


def test_a_candidate_that_computes_nan_is_no_end(files: Files, tmp_path: Path) -> None:
    result = evaluate(
        broken(files, tmp_path), reference=files.reference, dataset=files.rows, num_samples=3, num_prompts=3,
        max_tokens=4, device="cpu", activations=["bf16"],
    )  # fmt: skip
    (row,) = result.candidates
    assert row.non_finite
    assert row.greedy is not None
    assert row.health is not None
    assert result.reference_health is not None
    assert "num_texts" in result.reference_health
    assert not result.ok
    render(result)
