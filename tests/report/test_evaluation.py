"""An evaluation on its page, in a terminal, in a checkpoint's card and report."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from m27quant.checkpoint.card import with_section
from m27quant.cli.eval_view import human
from m27quant.evaluation.result import Evaluation
from m27quant.report import evaluation_words as words
from m27quant.report.document import plain
from m27quant.report.evaluation_card import entry, section, write_to
from m27quant.report.evaluation_page import render
from m27quant.report.html import render as render_report
from m27quant.report.recorded import Recorded
from tests.report.evaluations import BROKEN, EQUAL, EVIL, NO_TEXT, TASKS, evaluation, pair, row
from tests.report.pages import page_of, report_of

TWO = evaluation(
    row("max", 0.02),
    row("mse", 0.015),
    pairs=(pair("max", "mse", 0.005, 0.0001), pair("max", "mse", 1, 0.3, "top1")),
)
ALL = evaluation(
    row("max"), BROKEN, EQUAL, failures=("broken: 7 of 6,144 tokens get NaN or infinite logits",)
)
HOSTILE = evaluation(
    row(EVIL), reference=EVIL, dataset=(EVIL,), failures=(EVIL,), pairs=(pair(EVIL, EVIL, 1, 0.01),),
    reference_health={"not_measured": EVIL},
)  # fmt: skip


def terminal(result: Evaluation, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False).print(human(result))
    return out.getvalue()


def test_the_page_tells_every_figure_with_its_interval() -> None:
    page = render(TWO)
    for told in (
        "0.0200", "0.0150 to 0.0250", "0.0150", "1.0170", "91.8%", "4.5", "2.5 to 6.5", "W4A4, FP8 KV",
        "below 0.001", "mse is better", "0.300", "no difference shown", "22.00 dB (layer 2)", "90.0% (layer 2)",
        "needs 460 GB of memory", "no chat template", "6,144 in 12 windows of at most 512", "ab" * 32,
    ):  # fmt: skip
        assert told in page, told
    assert page.isascii()
    assert page.count('class="line ') == 2 * 3  # SQNR, routers and greedy texts of both rows
    assert "http" not in re.sub(r"<meta[^>]*>", "", page)


def test_places_on_the_page_are_in_the_order_of_their_figures() -> None:
    page = render(TWO)
    places = [float(at) for at in re.findall(r'class="point" style="left:([\d.]+)%"', page)]
    assert all(0 <= at <= 100 for at in places)
    assert places[0] > places[1]  # the KL divergences of max and mse
    ranges = re.findall(r'class="range" style="left:([\d.]+)%;width:([\d.]+)%"', page)
    assert all(
        float(left) < at < float(left) + float(width)
        for at, (left, width) in zip(places, ranges, strict=True)
    )


def test_tasks_and_why_a_model_was_not_asked() -> None:
    result = evaluation(row("max", tasks=TASKS), row("mse", tasks=NO_TEXT), reference_tasks=NO_TEXT)
    for shown in (render(result), terminal(result, 120)):
        assert "gsm8k: exact_match (strict-match)" in shown
        assert "0.6250 (0.6150 to 0.6350)" in shown
        assert "m27: no tasks: needs 460 GB of memory" in shown
        assert "mse: no tasks: needs 460 GB of memory" in shown
    assert "| gsm8k: exact\\_match | 0.7500 (0.7400 to 0.7600) |" in section(result.of("/data/max"))
    assert "lm-eval" not in section(result.of("/data/mse"))
    page = render_report(page_of(1, 2, evaluation=plain(entry(result))))
    assert "gsm8k: exact_match (strict-match)" in page
    assert "repeated 8-grams" in page
    assert "12.5% (6.2% to 56.2%)" in page


def test_what_is_no_number_is_shown_as_that() -> None:
    page, text = render(ALL), terminal(ALL)
    assert "Failed" in page
    assert "broken: 7 of 6,144 tokens" in page
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S).lower().replace(
        "nan or infinite", ""
    )
    assert "equal" in page
    assert "broken: no texts: needs 460 GB of memory" in text
    render(evaluation(EQUAL))
    render(evaluation(BROKEN))
    terminal(evaluation(EQUAL, reference_health=None))


def test_hostile_names_are_shown_literally() -> None:
    page = render(HOSTILE)
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert page.isascii()
    shown = terminal(HOSTILE, 200)
    assert "\x1b" not in shown
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in shown
    card = section(HOSTILE)
    assert "\x1b" not in card
    assert "<script>" not in card.replace("\\<", "")


@pytest.mark.parametrize(
    ("metric", "difference", "p", "better"),
    [
        ("kl", -0.1, 0.01, "a is better"),
        ("kl", 0.1, 0.01, "b is better"),
        ("nll", 0.1, 0.049, "b is better"),
        ("top1", 0.1, 0.01, "a is better"),
        ("top8", -0.1, 0.01, "b is better"),
        ("greedy", 3, 0.01, "a is better"),
        ("greedy", 3, 0.05, "no difference shown"),
        ("kl", 0.0, 0.01, "no difference shown"),
        ("kl", float("nan"), float("nan"), "not a number"),
    ],
)
def test_which_of_two_is_better(metric: str, difference: float, p: float, better: str) -> None:
    assert words.outcome(pair("x", "y", difference, p, metric)) == better


def test_the_terminal_keeps_to_80_columns() -> None:
    lines = terminal(TWO).splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"KL divergence, mean +max +0\.0200 +0\.0150 to 0\.0250", terminal(TWO))


def test_the_card_has_one_section_that_is_replaced() -> None:
    card = "---\nlicense: mit\n---\n# A model\n\n## Licence\n\nfree\n"
    once = with_section(card, "evaluation", "Against its source", section(TWO.of("/data/max")))
    assert once.index("## Against its source") < once.index("## Licence")
    assert "| KL divergence, mean | 0.0200 (0.0150 to 0.0250) |" in once
    assert "/data" not in once, "folders of the machine that measured are nobody's business"
    twice = with_section(once, "evaluation", "Against its source", section(TWO.of("/data/mse")))
    assert twice.count("m27quant:evaluation -->") == 2
    assert "0.0200" not in twice
    assert twice.replace("0.0150 (0.0112 to 0.0187)", "") != twice
    assert with_section("# Bare\n", "evaluation", "H", "x").startswith("# Bare\n\n## H\n")


def test_figures_in_the_checkpoints_report_come_onto_its_page(tmp_path: Path) -> None:
    report = tmp_path / "quantization_report.json"
    report.write_text(json.dumps(report_of(2, 4)))
    (tmp_path / "README.md").write_text("# A model\n")
    write_to(tmp_path, TWO.of("/data/max"))
    content = json.loads(report.read_text())
    assert {key: content[key] for key in report_of(2, 4)} == report_of(2, 4), "nothing else has changed"
    assert content["evaluation"]["candidates"][0]["kl"]["mean"]["value"] == 0.02
    assert "/data" not in json.dumps(content["evaluation"])
    page = render_report(page_of(2, 4, evaluation=content["evaluation"]))
    assert "Against m27 on 6,144 tokens of heldout.txt in 12 windows" in page
    assert "0.0200 (0.0150 to 0.0250)" in page


@pytest.mark.parametrize(
    "result", [evaluation(BROKEN), evaluation(EQUAL), HOSTILE], ids=["broken", "equal", "hostile"]
)
def test_whatever_was_measured_can_be_read_back(result: Evaluation) -> None:
    kept = json.loads(json.dumps(entry(result), allow_nan=False))
    assert Recorded.model_validate(report_of(1, 2, evaluation=kept)).evaluation is not None
    page = render_report(page_of(1, 2, evaluation=kept))
    assert "<script>alert" not in page


def test_a_checkpoint_without_a_report_gets_its_card_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A model\n")
    write_to(tmp_path, TWO.of("/data/max"))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
