"""A benchmark in words, tables and drawings; its figures are those that were measured."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import pytest

from m27quant.bench.plot import draw
from m27quant.bench.reading import Answer, Reading
from m27quant.bench.render import grids, lines, markdown
from m27quant.bench.result import Cell, Spread
from tests.bench.results import cell, example


def test_percentiles_are_values_that_occurred() -> None:
    spread = Spread.of([float(n) for n in range(100, 0, -1)])
    assert spread == Spread(50.5, 50.0, 99.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([]) is None


def test_a_cell_sums_up_its_answers() -> None:
    found = cell("t", 1, "block 4", seconds=2.0, steps=[3, 1, 2])
    assert (found.tokens_per_s, found.output_tokens, found.prompt_tokens) == (10, 20, 10)
    assert found.acceptance.tau == 3
    assert (found.step_verify_s, found.step_draft_s) == pytest.approx((0.010, 0.002))
    assert (found.zlab_local, found.zlab_server) == (3, pytest.approx(10 / 3))
    assert cell("t", 1, None, seconds=1.0).zlab_server is None


def test_speeds_stand_beside_the_run_without_drafts() -> None:
    result = example()
    speeds = {(s.setting, s.concurrency): s for s in result.speeds()}
    assert speeds["block 4", 1].measured == 2
    assert speeds["block 4", 1].predicted == pytest.approx(3 * 8 / 12)
    assert speeds["block 4", 8].measured == pytest.approx(0.625)
    assert [(a.concurrency, a.setting) for a in result.advice] == [(1, "block 4"), (8, None)]


def test_turns_tell_how_sure_the_ratio_is() -> None:
    """Ratios 1, 2 and 3: their mean has an error of 1 / sqrt(3)."""
    plain, drafted = (
        sum(
            (Reading(answers=[Answer(output_tokens=n)], seconds=1.0) for n in rates),
            Reading(answers=[], seconds=0.0),
        )
        for rates in ((10, 10, 10), (10, 20, 30))
    )
    cells = [Cell.of("t", 1, name, r) for name, r in ((None, plain), ("block 4", drafted))]
    result = dataclasses.replace(example(), cells=[dataclasses.replace(c, turns=c.turns[1:]) for c in cells])
    (speed,) = result.speeds()
    assert result.cells[1].turns == (10, 20, 30)
    assert speed.measured == 2
    assert speed.error == pytest.approx(3**-0.5)
    assert example().speeds()[0].error is None


def test_the_tables() -> None:
    speed, acceptance, steps = grids(example())
    assert speed.rows[1] == ["gsm8k", "1", "block 4", "20.0", "2.00x", "3.000", "50.0 ms", "4.0 ms"]
    assert speed.rows[0] == ["gsm8k", "1", "none", "10.0", "-", "-", "50.0 ms", "4.0 ms"]
    assert acceptance.headings[-3:] == ["C_1", "C_2", "C_3"]
    assert acceptance.rows[0] == ["gsm8k", "1", "block 4", "2.000", "66.7%", "1.000", "0.667", "0.333"]
    assert acceptance.rows[1][3:] == ["0.600", "20.0%", "0.600", "-", "-"]
    assert steps.rows[0] == ["gsm8k", "1", "block 4", "3.000", "8.00", "10.00", "2.00", "2.00x", "2.00x"]


def test_a_section_for_a_model_card() -> None:
    text = markdown(example())
    assert text.startswith(
        "| task | drafts | tokens/s, 1 at once | speed-up, 1 at once | tau, 1 at once | "
        "tokens/s, 8 at once | speed-up, 8 at once | tau, 8 at once |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| gsm8k | none | 10.0 | - | - | 40.0 | - | - |\n"
        "| gsm8k | block 4 | 20.0 | 2.00x | 3.000 | 25.0 | 0.62x | 1.250 |\n"
        "| gsm8k | block 2 | 12.5 | 1.25x | 1.600 | - | - | - |\n"
    )
    assert (
        "A CPU, 2 CPUs, cpu, activations bf16, KV cache float8_e4m3fn; greedy, at most 4,096 tokens" in text
    )
    assert "* 1 at once: take block 4 (--num-draft-tokens 3); tau 3.00 x 8 ms" in text
    assert "* 8 at once: draft nothing; block 4 is the best and does not pay" in text
    assert "* acceptance (runtime): every verify step of these requests" in text


def test_what_others_wrote_is_escaped() -> None:
    result = example()
    bad = "a|b<script>\x1b[31m"
    result.cells = [dataclasses.replace(c, task=bad, errors={bad: 1}) for c in result.cells]
    result.subject = result.machine["cpu"] = bad
    text = markdown(result)
    assert "<script>" not in text
    assert "\x1b" not in text
    assert all(
        row.replace("\\|", "").count("|") in (0, 9, 10) for row in text.splitlines() if row.startswith("|")
    )
    assert "\x1b" not in draw(result)
    ElementTree.fromstring(draw(result))


def test_bare_values() -> None:
    assert list(lines(example()))[:2] == [
        "gsm8k | 1 | none | 10.00 | 1.0000",
        "gsm8k | 1 | block 4 | 20.00 | 3.0000",
    ]


def test_the_document_has_every_count() -> None:
    found = json.loads(json.dumps(example().to_json()))
    drafted = found["cells"][1]
    assert drafted["acceptance"] | {"c_k": [], "conditional": []} == {
        "verify_steps": 6, "drafted": 18, "accepted": [6, 4, 2], "tau": 3.0, "m_accept": 2.0, "c_k": [],
        "conditional": [], "acceptance_rate": pytest.approx(2 / 3), "drafts_per_step": 3.0, "source": "runtime",
        "counted": "every verify step of these requests, by the runtime itself",
    }  # fmt: skip
    assert found["speeds"][0]["predicted"] == pytest.approx(2)
    assert found["advice"][0]["setting"] == "block 4"


def test_the_drawing() -> None:
    """A bar for each cell, a point for each position at which a draft was accepted."""
    result = example()
    root = ElementTree.fromstring(draw(result))
    space = "{http://www.w3.org/2000/svg}"
    bars = [
        e for e in root.iter(f"{space}rect") if "bar" in e.get("class", "") and float(e.get("height", 0)) > 10
    ]
    assert len(bars) == 5
    heights = [float(b.get("height", 0)) for b in bars]
    assert heights[1] == pytest.approx(2 * heights[0], rel=1e-3)
    assert len(list(root.iter(f"{space}circle"))) == 3 + 1
    result.cells = [c for c in result.cells if c.setting is None]
    assert "C_k" not in draw(result)


def test_a_failed_request_has_a_column() -> None:
    result = example()
    first: Cell = dataclasses.replace(result.cells[0], errors={"HTTP 500": 1})
    result.cells[0] = first
    (speed, *_) = grids(result)
    assert speed.headings[-1] == "failed"
    assert [row[-1] for row in speed.rows[:2]] == ["1 of 2", "0 of 2"]
    assert "failed: gsm8k, 1 at once: 1 of 2: HTTP 500" in markdown(result)
