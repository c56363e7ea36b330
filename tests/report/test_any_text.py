"""Property: whatever text a finding holds, every rendering is well-formed and shows no invisible character."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m27quant.report import document, github, gitlab, human, junit, sarif
from m27quant.verify.baseline import apply_baseline, read_baseline, to_baseline
from m27quant.verify.findings import Check, Finding, Severity, VerifyResult

ANYTHING = st.text(st.characters(exclude_categories=()), max_size=40)
NOT_EMPTY = st.text(st.characters(exclude_categories=()), min_size=1, max_size=40)
MAYBE = st.none() | ANYTHING
NUMBER = st.none() | st.integers(0, 10**6)

CHECK = st.builds(
    Check,
    code=st.sampled_from(["M27-C001", "M27-T002", "M27-S003"]),
    family=ANYTHING,
    severity=st.sampled_from(Severity),
    title=NOT_EMPTY,
    meaning=ANYTHING,
    engines=st.dictionaries(ANYTHING, ANYTHING, max_size=3),
    mend=ANYTHING,
)
FINDING = st.builds(
    Finding,
    check=CHECK,
    message=ANYTHING,
    file=MAYBE,
    tensor=MAYBE,
    layer=NUMBER,
    expert=NUMBER,
    expected=MAYBE,
    found=MAYBE,
    count=st.integers(1, 10**6),
    examples=st.lists(ANYTHING, max_size=3).map(tuple),
)
RESULT = st.builds(
    VerifyResult,
    checkpoint=ANYTHING,
    level=ANYTHING,
    findings=st.lists(FINDING, max_size=25).map(tuple),
    facts=st.dictionaries(ANYTHING, ANYTHING | st.floats() | st.lists(ANYTHING, max_size=3), max_size=3),
    checks_run=st.just(("M27-C001", "M27-T002", "M27-S003")),
)


@pytest.fixture(scope="module")
def validator(repository: Path) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(
        json.loads((repository / "docs/schemas/verify.schema.json").read_text())
    )


@given(made=RESULT)
def test_every_rendering_is_well_formed(
    made: VerifyResult, validator: jsonschema.Draft202012Validator
) -> None:
    texts = [module.render(made) for module in (human, document, junit, sarif, github, gitlab)]
    for text in (*texts, github.step_summary(made), human.concise(made) or ""):
        assert {c for c in text if not c.isprintable()} <= {"\n"}
    validator.validate(json.loads(texts[1]))
    assert len(ET.fromstring(texts[2]).findall(".//testcase")) == 3
    assert len(json.loads(texts[3])["runs"][0]["results"]) == len(made.findings)
    *commands, last = texts[4].split("\n")
    assert all(row.startswith(("::error ", "::warning ", "::notice ")) for row in commands)
    assert last.startswith("m27quant verify: ")
    assert len(json.loads(texts[5])) == len(made.findings)


@given(findings=st.lists(FINDING, max_size=10).map(tuple))
def test_a_baseline_accepts_what_it_was_made_from(
    findings: tuple[Finding, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "baseline.json"
    path.write_text(to_baseline(findings))
    assert apply_baseline(findings, read_baseline(path)) == ((), findings)
