"""Folding: a fault in every expert is one line, and it names the worst place."""

from __future__ import annotations

from pathlib import Path

import pytest

from m27quant import verify_checkpoint
from m27quant.verify.collect import MAX_EXAMPLES, Findings, place
from m27quant.verify.engines import Engine
from tests.faults import outputs as o
from tests.faults.edits import both


def expert(layer: int, index: int, part: str = "w2.input_scale") -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{index}.{part}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (expert(3, 7), (3, 7, "experts.w2.input_scale")),
        ("model.layers.3.mlp.experts.7.gate_proj.weight", (3, 7, "experts.gate_proj.weight")),
        ("model.layers.12.self_attn.k_proj.k_scale", (12, None, "self_attn.k_proj.k_scale")),
        ("lm_head.weight", (None, None, "lm_head.weight")),
        ("model.layers.1234567.x", (None, None, "model.layers.1234567.x")),
        ("model.layers.\u0661.x", (None, None, "model.layers.\u0661.x")),
    ],
)
def test_place(name: str, expected: tuple[int | None, int | None, str]) -> None:
    assert place(name) == expected


def test_experts_of_one_layer_are_one_finding_and_the_worst_is_shown() -> None:
    found = Findings()
    for index in range(256):
        found.add("M27-S002", f"expert {index}", tensor=expert(5, index), badness=float(index == 200))
    (finding,) = found.finish()
    assert (finding.message, finding.layer, finding.expert) == ("expert 200", 5, 200)
    assert finding.count == 256
    assert len(finding.examples) <= MAX_EXAMPLES
    assert finding.tensor not in finding.examples


def test_many_layers_and_many_roles_are_folded_and_counted() -> None:
    found = Findings()
    for layer in range(62):
        for index in range(16):
            for part in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
                for w in ("w1", "w2", "w3"):
                    found.add("M27-T001", "missing", tensor=expert(layer, index, f"{w}.{part}"))
    found.add("M27-T002", "missing", tensor="lm_head.weight")
    all_experts, head = found.finish()
    assert all_experts.count == 62 * 16 * 12
    assert head.count == 1


def test_few_layers_stay_apart() -> None:
    found = Findings()
    for layer in (4, 2):
        found.add("M27-S002", "zero", tensor=expert(layer, 0))
    assert [f.layer for f in found.finish()] == [2, 4]


def test_errors_come_first_then_the_gravest_family() -> None:
    found = Findings()
    for code in ("M27-D004", "M27-E001", "M27-C013", "M27-S001", "M27-C010"):
        found.add(code, code, file=code)
    assert [f.check.code for f in found.finish()] == [
        "M27-C010",
        "M27-S001",
        "M27-E001",
        "M27-C013",
        "M27-D004",
    ]


def test_the_same_folder_gives_the_same_findings(folder: Path) -> None:
    o.FAULTS["in-memory names"].change(folder)
    assert verify_checkpoint(folder).findings == verify_checkpoint(folder).findings


@pytest.mark.parametrize(
    ("engine", "fault", "is_found"),
    [
        ("vllm", "*mlp* excluded", True),
        ("sglang", "*mlp* excluded", False),
        ("vllm", "*block_sparse_moe* excluded", False),
        ("sglang", "*block_sparse_moe* excluded", True),
        ("vllm", "lm_head not excluded", True),
        ("sglang", "lm_head not excluded", False),
        ("sglang", "another producer", False),
        ("sglang", "router bias missing", True),
    ],
)
def test_one_engine_only(folder: Path, engine: Engine, fault: str, is_found: bool) -> None:
    o.FAULTS[fault].change(folder)
    result = verify_checkpoint(folder, level="quick", engine=engine)
    assert [f.check.code for f in result.findings] == ([o.FAULTS[fault].code] if is_found else [])
    assert result.ok is not is_found


def test_select_and_ignore(folder: Path) -> None:
    both(o.FAULTS["k_scale missing"].change, o.FAULTS["gate in BF16"].change)(folder)

    def codes(**options: tuple[str, ...]) -> list[str]:
        return [f.check.code for f in verify_checkpoint(folder, level="quick", **options).findings]  # type: ignore[arg-type]

    assert codes() == ["M27-T004", "M27-D003"]
    assert codes(select=("M27-T",)) == ["M27-T004"]
    assert codes(ignore=("M27-T004",)) == ["M27-D003"]
    assert codes(select=("M27",), ignore=("M27-D", "M27-T")) == []
