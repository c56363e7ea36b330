"""`m27quant explain` and docs/checks.md: every check has its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from m27quant.cli.app import main
from m27quant.report.checks import book, page
from m27quant.verify.checks import CHECKS
from m27quant.verify.findings import Check


def test_the_book_is_up_to_date(repository: Path) -> None:
    written = (repository / "docs" / "checks.md").read_text(encoding="utf-8")
    assert written == book(CHECKS.values()), "run `make docs`"


def test_the_book_has_a_section_and_a_row_for_each() -> None:
    text = book(CHECKS.values())
    for code in CHECKS:
        assert text.count(f"\n### {code}\n") == 1
        assert text.count(f"\n| [{code}](#{code.lower()}) |") == 1
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) == 7, row


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_every_check_says_what_and_what_next(check: Check) -> None:
    assert re.fullmatch(r"M27-[A-Z]\d{3}", check.code)
    assert check.title
    assert "\n" not in check.title
    assert not check.title.endswith(".")
    assert check.meaning.endswith((".", ")"))
    assert check.mend.endswith(".")
    assert set(check.engines) <= {"transformers", "vllm", "sglang"}
    text = page(check)
    for part in (check.code, check.title, check.meaning, check.mend, *check.engines.values()):
        assert part in text


@pytest.mark.parametrize("spelling", ["M27-C001", "m27-c001", "C001", " c001 "])
def test_one_check(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", spelling]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (page(CHECKS["M27-C001"]) + "\n", "")


def test_in_all_modes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "M27-C001", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["next_step"] == CHECKS["M27-C001"].mend
    assert main(["explain", "M27-C001", "--quiet"]) == 0
    assert capsys.readouterr().out == CHECKS["M27-C001"].title + "\n"


def test_without_a_code_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--quiet"]) == 0
    assert capsys.readouterr().out.split() == list(CHECKS)
    assert main(["explain", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["checks"]) == len(CHECKS)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("M27-C0O1", "closest: M27-C0"), ("M27-C01", "closest: M27-C0"), ("\x1b[2J", "see `m27quant explain`")],
)
def test_a_typo_is_answered_by_the_closest(typed: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", typed]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: there is no check '")
    assert f"\nhint: {hint}" in captured.err
    assert "\x1b" not in captured.err
