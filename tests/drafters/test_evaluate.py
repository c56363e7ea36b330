"""An evaluation: generation's own acceptance, differences that are paired, a card that says what was found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import m27quant
from m27quant import SamplingParams
from m27quant.drafters.card import BEGIN, with_evaluation
from m27quant.drafters.compare import paired_difference
from m27quant.drafters.evaluate import evaluate_drafter
from m27quant.drafters.evaluation import EvalOptions, EvalResult
from m27quant.drafters.evaluation_card import section
from m27quant.drafters.metrics import AcceptanceStats, total
from m27quant.errors import M27Error
from m27quant.runtime.generation import derived_seed
from m27quant.runtime.speculative.load import DrafterOptions

TINY = EvalOptions(num_prompts=3, prompt_tokens=12, max_tokens=20, stride=2, num_draft_tokens=(5,))


@pytest.fixture(scope="module")
def examples(repository: Path) -> Path:
    return repository / "examples"


@pytest.fixture(scope="module")
def result(examples: Path) -> EvalResult:
    """Both example drafters and prompt lookup; the second target is the first in other clothes."""
    drafters = [examples / "tiny-m27-dflash", examples / "tiny-m27-eagle3", "ngram"]
    target = examples / "tiny-m27"
    return evaluate_drafter(
        drafters, [target, target], examples / "tiny-m27/heldout.txt", TINY, command="m27quant x"
    )


SETTINGS = {
    "block of 6": ("tiny-m27-dflash", DrafterOptions(num_draft_tokens=5)),
    "chain of 3": ("tiny-m27-eagle3", DrafterOptions(num_steps=3)),
    "tree 3/4/5": ("tiny-m27-eagle3", DrafterOptions(num_steps=3, eagle_topk=4, num_draft_tokens=5)),
    "up to 5": ("ngram", DrafterOptions(num_draft_tokens=5)),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_is_what_generation_accepts(examples: Path, result: EvalResult, setting: str) -> None:
    name, options = SETTINGS[setting]
    row = next(row for row in result.rows if row.setting == setting)
    drafter = name if name == "ngram" else str(examples / name)
    llm = m27quant.load(examples / "tiny-m27", drafter=drafter, drafter_options=options)
    assert llm.tokenizer is not None
    ids = llm.tokenizer.rendered((examples / "tiny-m27/heldout.txt").read_text(encoding="utf-8"))
    prompts = [ids[at : at + 12] for at in (0, (len(ids) - 32) // 2, len(ids) - 32)]
    params = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, seed=derived_seed(0, i))
        for i in range(3)
    ]
    for stats, answer in zip(row.per_prompt, llm.generate(prompts, params), strict=True):
        engine = answer.stats.acceptance
        assert (stats.num_steps, stats.num_accepted, stats.num_drafted, stats.c_k) == (
            engine.num_steps, engine.num_accepted, engine.num_drafted, engine.c_k,
        )  # fmt: skip
    assert row.generation.tau > 1


def test_rows_and_their_figures(result: EvalResult) -> None:
    assert [row.setting for row in result.rows] == [*SETTINGS] * 2
    assert (result.num_prompts, result.num_tokens, result.invariant) == (3, 60, True)
    lookup = result.rows[3].generation
    for row in result.rows[:3]:
        document = row.to_json()
        stats = total(row.per_prompt)
        assert document["tau"] == stats.tau == 1 + document["m_accept"]
        assert sum(document["c_k"]) == pytest.approx(document["m_accept"])
        assert row.proxy is not None
        assert document["val_loss"] == row.proxy.val_loss > 0
        assert document["blocks"] == row.proxy.blocks == 3 * len(range(12, 32 - len(row.proxy.losses), 2))
        assert document["proxy"]["m_accept"] == pytest.approx(sum(document["proxy"]["c_k"]))
        if row.num_drafts == 5:
            assert row.ngram == lookup
    assert result.rows[3].proxy is None
    assert result.to_json()["results"][0]["target"].endswith("tiny-m27")


def test_the_same_target_differs_by_nothing(result: EvalResult) -> None:
    for first, second in zip(result.rows[:4], result.rows[4:], strict=True):
        assert first.difference is None
        assert second.difference is not None
        assert (second.difference.value, second.difference.standard_error) == (0, 0)
        assert first.per_prompt == second.per_prompt


def test_the_card_says_what_was_found(result: EvalResult) -> None:
    mine = result.of(result.rows[0].drafter)
    assert {row.setting for row in mine.rows} == {"block of 6"}
    text = section(mine)
    assert f"**{mine.rows[0].generation.tau:.3f}**" in text
    assert "    m27quant x" in text
    card = with_evaluation("# drafter\n", text)
    assert card.count(BEGIN) == 1
    assert with_evaluation(card, text) == card
    assert with_evaluation(with_evaluation(card, "other"), text) == card


def test_differences_are_paired() -> None:
    """Prompts differ by far more than targets do: only pairs tell the small difference."""
    generator = torch.Generator().manual_seed(0)
    easy = torch.randint(0, 60, (64,), generator=generator).tolist()
    here = [AcceptanceStats.of_histogram([20, accepted]) for accepted in easy]
    there = [AcceptanceStats.of_histogram([20, accepted, 1]) for accepted in easy]
    difference = paired_difference(here, there)
    expected = total(here).tau - total(there).tau
    assert difference.value == pytest.approx(expected)
    assert difference.low < expected < difference.high < 0
    unpaired = paired_difference(here, there[1:] + there[:1])
    assert unpaired.value == pytest.approx(expected)
    assert unpaired.standard_error > 5 * difference.standard_error
    with pytest.raises(ValueError, match="nothing to pair"):
        paired_difference(here, there[1:])


def test_the_standard_error_is_that_of_a_mean() -> None:
    """With equally many steps in each text the ratio of sums is a mean, whose error is known."""
    generator = torch.Generator().manual_seed(1)
    accepted = torch.randint(0, 10, (400,), generator=generator)
    here = [AcceptanceStats.of_histogram([10 - a, a]) for a in accepted.tolist()]
    there = [AcceptanceStats.of_histogram([5, 5])] * 400
    expected = (accepted.double() / 10).std(correction=0).item() / 400**0.5
    assert paired_difference(here, there).standard_error == pytest.approx(expected, rel=0.05)


def test_what_cannot_be_measured(examples: Path, tmp_path: Path) -> None:
    target, text = examples / "tiny-m27", examples / "tiny-m27/heldout.txt"
    with pytest.raises(M27Error, match="nothing to measure"):
        evaluate_drafter([], target, text)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(M27Error, match="is empty"):
        evaluate_drafter("ngram", target, tmp_path / "empty.txt", TINY)
    with pytest.raises(M27Error, match="at least 1"):
        EvalOptions(stride=0)
    with pytest.raises(M27Error, match="num_draft_tokens"):
        EvalOptions(num_draft_tokens=(0,))
    with pytest.raises(M27Error, match=r"no such folder|neither a folder"):
        evaluate_drafter(tmp_path / "missing", target, text, TINY)
