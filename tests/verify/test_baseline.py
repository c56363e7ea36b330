"""Accepted findings: written, read back, and no more than what was accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m27quant.errors import UsageError
from m27quant.verify.baseline import apply_baseline, read_baseline, to_baseline
from tests.report.results import EVIL, MANY, MIXED, finding


@pytest.mark.parametrize("made", [MIXED, EVIL, MANY])
def test_what_was_written_is_accepted(made: object, tmp_path: Path) -> None:
    findings = made.findings  # type: ignore[attr-defined]  # a VerifyResult
    path = tmp_path / "baseline.json"
    path.write_text(to_baseline(findings))
    assert apply_baseline(findings, read_baseline(path)) == ((), findings)


def test_only_that_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(to_baseline([finding(count=3)]))
    accepted = read_baseline(path)
    fewer, elsewhere, more = finding(count=2), finding(layer=9), finding(count=4)
    assert apply_baseline([fewer, elsewhere], accepted) == ((elsewhere,), (fewer,))
    assert apply_baseline([more], accepted) == ((more,), ())
    assert apply_baseline([fewer, fewer], accepted) == ((fewer,), (fewer,))
    reworded = finding(message="other words")
    assert apply_baseline([reworded], accepted) == ((), (reworded,))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema_version": 2, "accepted": []}',
        '{"schema_version": 1, "accepted": {}}',
        '{"schema_version": 1, "accepted": [7]}',
        '{"schema_version": 1, "accepted": [{"fingerprint": "a", "count": true}]}',
        '{"schema_version": 1, "accepted": [{"fingerprint": "a", "count": 0}]}',
        '{"schema_version": 1, "accepted": [{"fingerprint": 1, "count": 1}]}',
    ],
)
def test_what_is_no_baseline_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"baseline\.json"):
        read_baseline(path)
    with pytest.raises(UsageError, match="no such file"):
        read_baseline(tmp_path / "none.json")


def test_a_person_can_review_it() -> None:
    (entry,) = json.loads(to_baseline([finding()]))["accepted"]
    assert set(entry) == {"code", "fingerprint", "count", "message"}
