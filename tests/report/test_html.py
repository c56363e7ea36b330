"""The page: well formed, self-contained, light, and closed to whatever a checkpoint says."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from m27quant.report import plots
from m27quant.report.html import Page, render
from m27quant.report.measured import blank, contradictions
from m27quant.report.recorded import Recorded
from tests.report.pages import measured_of, page_of, report_of
from tests.report.results import ALL, CLEAN, ERROR, EVIL, HOSTILE, MIXED, finding, result

VOID = {"meta", "link", "input", "br"}
NASTY = (
    "</script><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "]]>--!><!--",
    "\u2028\u2029\x00\x1b[2J",
    "{{ 7*7 }}{% raw %}",
    "javascript:alert(1)",
    HOSTILE,
)


class Reader(HTMLParser):
    """Elements, attributes and text; an element that is not closed where it should be is a fault."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    return reader


def words(page: str) -> str:
    return " ".join(" ".join(read(page).text).split())


@pytest.mark.parametrize("name", ALL)
def test_pages_are_well_formed_ascii(name: str) -> None:
    page = render(page_of(5, 8, ALL[name]))
    assert page.isascii()
    assert page.startswith("<!doctype html>")
    assert [tag for tag, _ in read(page).elements].count("h1") == 1


@pytest.mark.parametrize("text", NASTY)
def test_nothing_that_a_checkpoint_says_becomes_markup(text: str) -> None:
    """Everywhere at once: the page has the elements that harmless text gives, and no other."""
    pages = []
    for word in ("word", text):
        check = replace(ERROR, title=word, meaning=word, mend=word, engines={word: word})
        found = finding(
            check, message=word, file=word, tensor=word, expected=word, found=word, count=2, examples=(word,)
        )
        told = word.replace("\ud800", "")  # which no report that is read can hold
        given = page_of(
            3,
            4,
            result(found, checkpoint=word, level=word, facts={"quant_algo": word, "kv_cache": word}),
            producer={"name": told, "version": told},
            source={"name": told, "repo_id": told, "commit": told},
            recipe={"name": told},
            calibration={
                "datasets": [told], "num_samples": 1, "num_tokens": 1, "seq_len": 1, "moe_calib": told
            },
            notices=[told],
        )  # fmt: skip
        pages.append(read(render(replace(given, licence={"license": word}))))
    harmless, hostile = ([(tag, sorted(attrs)) for tag, attrs in page.elements] for page in pages)
    assert hostile == harmless
    assert not any(name.startswith("on") for _, attributes in hostile for name in attributes)


def test_nothing_is_loaded_from_anywhere() -> None:
    page = render(page_of(3, 4, EVIL))
    for tag, attributes in read(page).elements:
        for name in ("src", "href", "action", "srcset", "xlink:href", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    assert "default-src 'none'" in page


def test_a_page_of_full_size_is_light(record_property: Callable[[str, object], None]) -> None:
    given = page_of(62, 256)
    start_s = time.perf_counter()
    page = render(given)
    elapsed_s = time.perf_counter() - start_s
    record_property("62 x 256 page", f"{len(page):,} bytes in {elapsed_s:.2f} s")
    assert len(page) < 3_000_000
    assert page.count("<") < 10_000


def test_the_verdict_comes_first() -> None:
    for given, word in ((MIXED, "Failed"), (CLEAN, "Passed")):
        assert words(render(page_of(2, 4, given))).index(word) < 200
    warned = result(*(f for f in MIXED.findings if f.severity == "warning"))
    assert "Passed, with warnings" in words(render(page_of(2, 4, warned)))


def test_findings_stand_with_their_next_step() -> None:
    text = words(render(page_of(2, 4, MIXED)))
    for found in MIXED.findings:
        assert found.message in text
        assert found.check.mend in text
        assert found.check.code in text


def test_without_a_report_the_tensors_speak() -> None:
    page = Page(result=CLEAN, measured=measured_of(report_of(4, 8)), unrecorded="There is none.")
    text = words(render(page))
    assert "There is none." in text
    assert "weight_scale_2 by layer" in text
    assert "KV cache scales by layer" in text
    assert "mean weight SQNR" not in text
    assert "Expert coverage" not in text


def test_without_anything_there_is_still_a_page() -> None:
    text = words(render(Page(result=MIXED, measured=blank(), unrecorded="There is none.")))
    assert "Failed" in text
    assert "Expert by expert" not in text


def test_a_report_about_another_checkpoint_is_not_used() -> None:
    given = page_of(4, 8)
    other = replace(given, measured=measured_of(report_of(3, 8)))
    text = words(render(other))
    assert "about 4 layers of 8 experts, this checkpoint has 3 layers of 8 experts: not used" in text
    assert "mean weight SQNR" not in text


def test_scales_that_contradict_the_report_are_told() -> None:
    report = report_of(2, 4)
    measured = measured_of(report)
    assert contradictions(Recorded.model_validate(report), measured) == 0
    measured.input_scale[1, 2, 1] *= 2
    measured.weight_scale_2[0, 0, 0] = np.nan  # missing: the findings say so
    assert contradictions(Recorded.model_validate(report), measured) == 1
    page = Page(result=CLEAN, measured=measured, recorded=Recorded.model_validate(report))
    assert "names 1 scale that is not what the tensors hold" in words(render(page))


def test_the_same_input_gives_the_same_page() -> None:
    assert render(page_of(3, 4)) == render(page_of(3, 4))


@pytest.mark.parametrize(
    ("low", "high"), [(20.1, 20.6), (0, 0), (5, 5), (-3, 7e12), (1e-30, 2e-30), (0, 1e15)]
)
def test_ticks_enclose_what_is_drawn(low: float, high: float) -> None:
    ticks = plots._ticks(low, high)
    assert 2 <= len(ticks) <= 12
    billionth = 1e-9 * (ticks[1] - ticks[0])
    assert ticks[0] <= low + 2 * billionth
    assert ticks[-1] >= high - 2 * billionth


@pytest.mark.parametrize(("low", "high"), [(1e-4, 3e-4), (1, 1), (1e-38, 3e38), (0.9, 1.1), (7, 800)])
def test_logarithmic_ticks_do_too(low: float, high: float) -> None:
    ticks = plots._log_ticks(low, high)
    assert 1 <= len(ticks) <= 12
    assert ticks == sorted(ticks)


def test_extreme_numbers_stay_within_the_drawing() -> None:
    """Every place of every shape is finite and within the chart."""
    values = np.array([1e-45, np.nan, 3e38, 1.0, 0.0])
    for log in (False, True):
        drawing = str(plots.lines([plots.Series(name="s", mid=values)], label="s", log=log))
        for y in re.findall(r' (?:y|y1|y2|cy)="([^"]+)"', drawing):
            assert 0 <= float(y) <= plots.HEIGHT


def test_gaps_break_the_line() -> None:
    values = np.array([1.0, 2.0, np.nan, 2.0, 1.0])
    drawing = str(plots.lines([plots.Series(name="s", mid=values)], label="s"))
    assert drawing.count('class="line s0"') == 2
    assert plots.lines([plots.Series(name="s", mid=np.full(3, np.nan))], label="s") is None
