"""The card's section on NVFP4: the script writes what lies in the card, and writing it again changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NUMBER = r"([\d.]+)%?"


@pytest.fixture(scope="module")
def card(script: Callable[[str], ModuleType]) -> Any:
    return script("card")


def rows_of(text: str, card: Any) -> list[Any]:
    """The table of a card as the rows that it was written from."""
    source = float(re.findall(r"in these windows is ([\d.]+):", text)[0])
    tokens, seq_len = re.findall(r"over all ([\d,]+) tokens of `heldout.txt` in windows of (\d+)", text)[0]
    windows = re.findall(r"--num-samples (\d+)", text)[0]
    fault = re.findall(r"Last row: with the (.*?), found as ([\w-]+)\.", text)
    rows = []
    for inputs, kv_cache, *cells in re.findall(
        rf"^\| ([^|]*NVFP4[^|]*|not quantized[^|]*) \| (FP8|BF16) \| {NUMBER} \| {NUMBER} \| {NUMBER} \| "
        rf"{NUMBER} \| {NUMBER} \| {NUMBER} \|$",
        text,
        re.MULTILINE,
    ):
        broken = "halved" in inputs
        mean, p99, largest, top1, perplexity, ratio = map(float, cells)
        rows.append(
            card.NvFp4Row(
                inputs=inputs.partition(", one expert")[0], kv_cache=kv_cache,
                fault=fault[0][0] if broken else "", codes=(fault[0][1],) if broken else (),
                num_tokens=int(tokens.replace(",", "")), num_windows=int(windows), seq_len=int(seq_len),
                kl_mean=mean, kl_p99=p99, kl_max=largest, top1_agreement=top1 / 100,
                perplexity_source=source, perplexity=perplexity, perplexity_ratio=ratio,
            )
        )  # fmt: skip
    return rows


def test_the_card_is_what_the_script_writes(card: Any, repository: Path) -> None:
    text = (repository / "examples/tiny-m27/README.md").read_text(encoding="utf-8")
    rows = rows_of(text, card)
    assert len(rows) == 5
    assert card.put_nvfp4_section(text, rows) == text
    above, _, below = text.partition(card.NVFP4)
    without = above + card.BEHIND + below.partition(card.BEHIND)[2]
    assert card.put_nvfp4_section(without, rows) == text


def test_the_figures_agree_with_each_other(card: Any, repository: Path) -> None:
    text = (repository / "examples/tiny-m27/README.md").read_text(encoding="utf-8")
    *good, halved = rows_of(text, card)
    held_out = re.findall(r"files in `heldout.txt`, ([\d,]+) tokens", text)[0]
    for row in (*good, halved):
        assert row.num_tokens == int(held_out.replace(",", ""))
        assert row.perplexity / row.perplexity_source == pytest.approx(row.perplexity_ratio, abs=6e-4)
        assert row.kl_mean < row.kl_p99 < row.kl_max
    assert halved.codes == ("M27-L005",)
    assert halved.kl_mean > 1.5 * good[0].kl_mean
