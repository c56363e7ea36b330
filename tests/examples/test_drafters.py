"""The tiny drafters as they lie in examples/: no engine objects to them, and their cards state what they are worth."""

from __future__ import annotations

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


def measured(folder: Path) -> dict[str, tuple[float, float]]:
    """By setting, what the card says of generated text: tau with the drafter and with prompt lookup."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]+ \| \*\*([\d.]+)\*\* \| [^|]+ \| [^|]+ \| ([\d.]+) \|$", card, re.MULTILINE
    )
    return {setting: (float(tau), float(lookup)) for setting, tau, lookup in rows}


@pytest.mark.parametrize(
    ("kind", "setting", "least"), [("dflash", "block of 8", 2.5), ("eagle3", "chain of 3", 2.2)]
)
def test_cards_state_what_the_drafters_are_worth(
    repository: Path, kind: str, setting: str, least: float
) -> None:
    tau, lookup = measured(repository / f"examples/tiny-m27-{kind}")[setting]
    assert tau >= least
    assert tau >= lookup + 0.5


def test_a_tree_is_worth_more_than_a_chain(repository: Path) -> None:
    settings = measured(repository / "examples/tiny-m27-eagle3")
    assert settings["tree 3/4/8"] > settings["chain of 3"]


@pytest.mark.parametrize("kind", KINDS)
def test_cards_say_how_they_were_made(repository: Path, kind: str) -> None:
    card = (repository / f"examples/tiny-m27-{kind}/README.md").read_text(encoding="utf-8")
    for command in (
        "generate-data examples/tiny-m27",
        f"train {kind} --target examples/tiny-m27",
        "eval examples/",
    ):
        assert f"    m27quant drafter {command}" in card
    assert re.search(r"[\d.]+% of the generated tokens end an 8-gram that had occurred before", card)
