"""The evaluation's page in a browser: on a phone, by keyboard, without a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from m27quant.report.evaluation_page import render
from tests.report.evaluations import BROKEN, TASKS, evaluation, pair, row
from tests.serve.browser import TAB, browser, missing

PHONE = """
const frame = document.createElement("iframe");
frame.style = "width: 360px; height: 900px; border: 0";
frame.srcdoc = arguments[0];
document.body.append(frame);
"""
STICKING_OUT = """
const page = document.querySelector("iframe").contentDocument;
const outside = (e) => !e.closest(".scroll, svg") && e.getBoundingClientRect().right > 360;
return [...page.querySelectorAll("body *")].filter(outside).map((e) => e.outerHTML.slice(0, 80));
"""
LONG = "a-name-as-long-as-those-of-checkpoints-are-that-many-people-made"


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_in_a_browser(tmp_path: Path) -> None:
    rows = row(LONG, tasks=TASKS), row("mse", 0.015, tasks=TASKS), BROKEN
    page, empty = tmp_path / "eval.html", tmp_path / "empty.html"
    page.write_text(
        render(evaluation(*rows, pairs=(pair(LONG, "mse", 0.005, 0.001),), failures=("broken: " * 30,)))
    )
    empty.write_text("<!doctype html><body></body>")
    with browser(tmp_path / "profile") as chromium:
        chromium.open(empty.as_uri())
        chromium.run(PHONE, page.read_text())
        chromium.wait("document.querySelector('iframe').contentDocument.querySelector('footer')")
        assert chromium.run(STICKING_OUT) == []

        chromium.open(page.as_uri())
        focused = set()
        for _ in range(8):
            chromium.keys(TAB)
            focused.add(
                chromium.run("return document.activeElement.ariaLabel ?? document.activeElement.tagName")
            )
        assert {"Rows", "Tests of pairs", "SUMMARY", "Greedy texts", "Standard tasks"} <= focused
        points = "document.querySelectorAll('.track .point')"
        assert chromium.run(
            f"return {points}[0].getBoundingClientRect().x > {points}[1].getBoundingClientRect().x"
        )
        before = chromium.run("return getComputedStyle(document.body).backgroundColor")
        chromium.run("document.querySelector('#theme').click()")
        assert chromium.run("return getComputedStyle(document.body).backgroundColor") != before
