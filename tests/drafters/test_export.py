"""What training writes: engines' layouts, verify's checks, the runtime's drafts, the card and the curve."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import m27quant
from m27quant.checkpoint.config import read_config
from m27quant.drafters.card import BEGIN, END, with_evaluation
from m27quant.drafters.curve import draw
from m27quant.runtime.speculative.load import load_drafter
from m27quant.verify.collect import Findings
from m27quant.verify.drafter import check_drafter
from m27quant.verify.findings import Severity
from tests.drafters.conftest import SMALL

COMMAND = "m27quant drafter train KIND --out 'a b'\x1b[31m"


@pytest.fixture(scope="module", params=[("dflash", "plain"), ("dflash", "speculators"), ("eagle3", "plain"),
                                        ("eagle3", "speculators")], ids="-".join)  # fmt: skip
def trained(
    request: pytest.FixtureRequest, target: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Path]:
    kind, layout = request.param
    out = tmp_path_factory.mktemp("trained") / "out"
    options = SMALL[kind] | {"layout": layout, "heldout": "0.2", "steps": 4}
    m27quant.train_drafter(kind, target, rows, out, command=COMMAND, **options)
    return kind, layout, out


def test_verify_finds_no_fault(trained: tuple[str, str, Path], target: Path) -> None:
    found = Findings()
    facts = check_drafter(trained[2], read_config(target)[0], found)
    assert not [f for f in found.finish() if f.severity is Severity.ERROR]
    assert facts["hidden_states"] == list(SMALL[trained[0]]["taps"])


def test_the_runtime_drafts_with_it_and_changes_no_token(
    trained: tuple[str, str, Path], target: Path
) -> None:
    params = m27quant.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with_it, without = (
        m27quant.load(target, drafter=drafter).generate([[1, 2, 3]], params)[0].token_ids
        for drafter in (trained[2], None)
    )
    assert with_it == without


def test_tensors_and_taps_are_those_of_the_layout(trained: tuple[str, str, Path], target: Path) -> None:
    kind, layout, out = trained
    config = json.loads((out / "config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    states = list(SMALL[kind]["taps"])
    loaded = load_drafter(out, read_config(target)[0], torch.zeros(64, 48), torch.zeros(64, 48))
    assert list(loaded.choice.hidden_states) == states
    if kind == "dflash":
        assert len(tensors) == 11 * 2 + 3
        where = config if layout == "speculators" else config["dflash_config"]
        key, shift = ("aux_hidden_state_layer_ids", 0) if layout == "speculators" else ("target_layer_ids", 1)
        assert where[key] == [state - shift for state in states]
    else:
        prefix = "layers.0." if layout == "speculators" else "midlayer."
        assert f"{prefix}hidden_norm.weight" in tensors
        assert config["eagle_aux_hidden_state_layer_ids"] == states
        if layout == "plain":
            nested = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
            assert nested == [state - 1 for state in states]
        known = torch.arange(40) + tensors["d2t"]
        assert tensors["t2d"].nonzero()[:, 0].equal(known)
    assert {t.dtype for t in tensors.values()} <= {torch.bfloat16, torch.int64, torch.bool}
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_card_says_how_it_was_made(trained: tuple[str, str, Path]) -> None:
    kind, _, out = trained
    card = (out / "README.md").read_text()
    states = list(SMALL[kind]["taps"])
    assert f"hidden states {states} of the target" in card
    assert "    m27quant drafter train KIND --out 'a b'?[31m\n" in card
    assert "![Loss and accuracy over the steps](training.svg)" in card
    assert "While it was trained, from finished text of 2 samples" in card
    assert "\x1b" not in card
    filled = with_evaluation(card, "| tau |\n|---|\n| 2.5 \\1 |")
    assert "| 2.5 \\1 |" in filled
    assert filled.count(BEGIN) == filled.count(END) == 1
    assert with_evaluation(with_evaluation(card, "other"), "| tau |\n|---|\n| 2.5 \\1 |") == filled


def test_the_curve_shows_every_series(trained: tuple[str, str, Path]) -> None:
    root = ElementTree.fromstring((trained[2] / "training.svg").read_text())
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"loss", "training", "held out", "position 1", "position 2"} <= texts


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_a_curve_of_any_length(count: int) -> None:
    entries: list[dict[str, Any]] = [
        {"event": "step", "step": n + 1, "loss": 5.0 / (n + 1), "accuracy": [0.5] * (1 + n % 2)}
        for n in range(count)
    ]
    drawn = draw(entries)
    ElementTree.fromstring(drawn)
    assert "nan" not in drawn
    assert len(drawn) < 40_000
