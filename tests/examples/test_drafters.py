"""The tiny drafters as they lie in examples/: no engine objects to them, and their cards state what they are worth."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from m27quant.checkpoint.config import read_config
from m27quant.verify.collect import Findings
from m27quant.verify.drafter import check_drafter
from m27quant.verify.findings import Severity

KINDS = ("dflash", "eagle3")


@pytest.mark.parametrize("kind", KINDS)
def test_no_engine_has_a_quarrel_with_them(repository: Path, kind: str) -> None:
    target, _ = read_config(repository / "examples/tiny-m27")
    found = Findings()
    check_drafter(repository / f"examples/tiny-m27-{kind}", target, found)
    assert not [f for f in found.finish() if f.severity is Severity.ERROR]


def test_all_examples_are_small(repository: Path) -> None:
    folders = [repository / "examples" / name for name in ("tiny-m27", "tiny-m27-dflash", "tiny-m27-eagle3")]
    assert (
        sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.is_file()) < 20e6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_cards_state_more_than_prompt_lookup_reaches(repository: Path, kind: str) -> None:
    card = (repository / f"examples/tiny-m27-{kind}/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| \*\*([\d.]+)\*\* \| [\d.]+ \| [^|]* \| ([\d.]+) \|", card)
    assert len(rows) >= 2
    for drafter, lookup in rows:
        assert float(drafter) > max(2.0, float(lookup))
    config = json.loads((repository / f"examples/tiny-m27-{kind}/config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == 2048
