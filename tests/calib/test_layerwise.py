"""Calibration through the whole program on models that are made to misbehave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from m27quant import quantize_checkpoint
from m27quant.calib.layer_ranges import amax
from m27quant.calib.layerwise import Dropped
from m27quant.errors import CalibrationError
from tests.checkpoints import Shape, random_tensors, read_tensors, stored, write_checkpoint
from tests.tolerance import AMAX_BF16_STEPS, bf16_steps

SHAPE = Shape(hidden_size=80, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, vocab_size=64)
LOUD = 63
"""A token that ordinary rows do not hold; models are built so that it breaks them."""
HUGE = 3e38
"""Close to the largest BF16 number."""

Tensors = dict[str, torch.Tensor]


def moe(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe."


def ordinary_rows(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(LOUD, (20 + i % 5,), generator=generator).tolist() for i in range(count)]


@dataclass(frozen=True)
class Outcome:
    """What a run wrote."""

    tensors: Tensors
    report: dict[str, Any]

    def scale(self, name: str) -> float:
        return float(self.tensors[name])

    def scales(self) -> dict[str, float]:
        """All that calibration measured."""
        kinds = ("input_scale", "k_scale", "v_scale")
        return {n: float(t) for n, t in self.tensors.items() if n.endswith(kinds)}


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Quantize a random BF16 model that `change` has altered, on `rows`."""
    count = 0

    def quantize(
        rows: list[list[int]], change: Callable[[Tensors], None] = lambda t: None, **options: Any
    ) -> Outcome:
        nonlocal count
        count += 1
        folder = tmp_path / str(count)
        tensors = stored(random_tensors(SHAPE), fp8=False)
        change(tensors)
        write_checkpoint(folder / "model", SHAPE, fp8=False, tensors=tensors)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        chosen: dict[str, Any] = {"dataset": str(data), "num_samples": len(rows), "device": "cpu"}
        report = quantize_checkpoint(str(folder / "model"), folder / "out", **chosen | options).report
        assert report == json.loads((folder / "out" / "quantization_report.json").read_text())
        return Outcome(read_tensors(folder / "out"), report)

    return quantize


# -- ranges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe_calib", ["full", "natural"])
def test_ranges_of_all_rows_are_the_largest_of_any(moe_calib: str, run: Run) -> None:
    """Sequences do not see each other: positions begin anew, attention ends at the row's end."""
    a, b = ordinary_rows(3, seed=1), ordinary_rows(4, seed=2)
    both, one, two = (run(rows, moe_calib=moe_calib).scales() for rows in (a + b, a, b))
    assert both != one
    assert both != two
    for name in both:
        assert bf16_steps(both[name], max(one[name], two[name])) <= AMAX_BF16_STEPS, name


def test_coverage_is_reported(run: Run) -> None:
    rows = ordinary_rows(5)
    tokens = sum(map(len, rows))
    full = run(rows).report
    natural = run(rows, moe_calib="natural").report
    assert full["calibration"]["num_tokens"] == natural["calibration"]["num_tokens"] == tokens
    for mine, theirs in zip(full["layers"], natural["layers"], strict=True):
        assert mine["seen_tokens"] == [tokens] * 4
        assert mine["routed_tokens"] == theirs["routed_tokens"] == theirs["seen_tokens"]
        assert sum(mine["routed_tokens"]) == 2 * tokens
    summary = full["summary"]["coverage"]
    assert (summary["seen_tokens_min"], summary["seen_tokens_max"]) == (tokens, tokens)
    assert summary["cold_experts"] == 0
    assert full["calibration"]["moe_calib"] == "full"


def never_chosen(tensors: Tensors) -> None:
    tensors[moe(1) + "e_score_correction_bias"][2] = -100


def test_a_cold_expert_is_measured_on_every_token_all_the_same(run: Run) -> None:
    rows = ordinary_rows(4)
    found = run(rows, never_chosen)
    layer = found.report["layers"][1]
    assert layer["routed_tokens"][2] == 0
    assert layer["seen_tokens"] == [sum(map(len, rows))] * 4
    assert found.report["summary"]["coverage"]["cold_experts"] == 1
    others = {found.scale(f"{moe(1)}experts.{e}.w2.input_scale") for e in range(4)}
    assert len(others) > 1, "ranges of their own"
    assert found.report["summary"]["zero_ranges"] == []


def test_under_natural_coverage_a_cold_expert_takes_the_layers_range(run: Run) -> None:
    found = run(ordinary_rows(4), never_chosen, moe_calib="natural")
    assert found.report["layers"][1]["seen_tokens"][2] == 0
    assert found.report["summary"]["coverage"]["seen_tokens_min"] == 0
    scales = {found.scale(f"{moe(1)}experts.{e}.w2.input_scale") for e in range(4)}
    assert len(scales) == 1
    assert scales != {0.5 / 2688}, "not modelopt's default"


# -- ranges of zero --------------------------------------------------------------------------------


def test_an_expert_that_gives_nothing_takes_the_widest_range_of_its_layer(run: Run) -> None:
    """w1 = 0 makes w2's input 0; a scale of 0 would divide by it in every engine."""

    def silence(tensors: Tensors) -> None:
        tensors[moe(0) + "experts.1.w1.weight"].zero_()

    found = run(ordinary_rows(3), silence)
    scales = [found.scale(f"{moe(0)}experts.{e}.w2.input_scale") for e in range(4)]
    assert scales[1] == max(scales) > min(scales) > 0
    summary = found.report["summary"]
    assert summary["zero_ranges"] == [f"{moe(0)}experts.1.w2"]
    assert summary["dead_matrices"] == 1
    assert found.report["layers"][0]["dead"] == [f"{moe(0)}experts.1.w1"]
    notices = " ".join(found.report["notices"])
    assert "1 expert matrices are all zero" in notices
    assert "1 ranges were zero" in notices
    w1, w3 = (found.tensors[f"{moe(0)}experts.1.{w}.weight_scale_2"] for w in ("w1", "w3"))
    assert w1 == w3 > 0
    assert not found.tensors[f"{moe(0)}experts.1.w1.weight"].any()


def test_where_a_whole_layer_gives_nothing_scales_are_one(run: Run) -> None:
    def silence(tensors: Tensors) -> None:
        for e in range(4):
            tensors[f"{moe(0)}experts.{e}.w3.weight"].zero_()
        tensors["model.layers.1.self_attn.v_proj.weight"].zero_()

    found = run(ordinary_rows(3), silence)
    assert {found.scale(f"{moe(0)}experts.{e}.w2.input_scale") for e in range(4)} == {1.0}
    name = "model.layers.1.self_attn.v_proj.v_scale"
    assert found.scale(name) == 1.0
    assert name in found.report["summary"]["zero_ranges"]
    assert len(found.report["summary"]["zero_ranges"]) == 5


# -- rows that are not finite ----------------------------------------------------------------------


def only_the_loud_token_has_dimension_0(tensors: Tensors) -> None:
    """From the embedding through layer 0's attention."""
    tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0
    table = tensors["model.embed_tokens.weight"]
    table[:, 0] = 0
    table[LOUD] = 0
    table[LOUD, 0] = 1


def values_overflow(tensors: Tensors) -> None:
    """The loud token's V is infinite in layer 0."""
    only_the_loud_token_has_dimension_0(tensors)
    tensors["model.layers.0.self_attn.v_proj.weight"][:, 0] = HUGE


def output_overflows(tensors: Tensors) -> None:
    """The loud token's MoE output is infinite in layer 0: every expert is huge in its direction."""
    only_the_loud_token_has_dimension_0(tensors)
    for e in range(4):
        for w in ("w1", "w3"):
            tensors[f"{moe(0)}experts.{e}.{w}.weight"][:, 0] = HUGE


def last_output_overflows(tensors: Tensors) -> None:
    """The loud token keeps dimension 0 to itself up to layer 1, whose experts amplify it beyond the end."""
    only_the_loud_token_has_dimension_0(tensors)
    tensors["model.embed_tokens.weight"][LOUD, 0] = 100
    tensors["model.layers.1.self_attn.o_proj.weight"][0] = 0
    for e in range(4):
        tensors[f"{moe(0)}experts.{e}.w2.weight"][0] = 0
        for w in ("w1", "w3"):
            tensors[f"{moe(1)}experts.{e}.{w}.weight"][:, 0] = 3
        tensors[f"{moe(1)}experts.{e}.w2.weight"][0] = HUGE / 1000


@pytest.mark.parametrize(
    ("fault", "not_counted_in", "not_measured_in"),
    [(values_overflow, (0, 1), (0, 1)), (output_overflows, (0, 1), (1,)), (last_output_overflows, (1,), ())],
)
@pytest.mark.parametrize("moe_calib", ["full", "natural"])
def test_a_row_that_overflows_is_dropped_and_counted(
    moe_calib: str,
    fault: Callable[[Tensors], None],
    not_counted_in: tuple[int, ...],
    not_measured_in: tuple[int, ...],
    run: Run,
) -> None:
    """1 of 12 rows; from where it broke, figures and ranges are those of a run without it."""
    rows = ordinary_rows(11)
    bad = [*rows[:5], [1, 2, LOUD, 3, 4], *rows[5:]]
    found, without = run(bad, fault, moe_calib=moe_calib), run(rows, fault, moe_calib=moe_calib)
    assert without.report["calibration"]["dropped_rows"] == []
    assert found.report["calibration"]["dropped_rows"] == [5]
    assert "1 calibration rows gave NaN or Inf and were dropped" in found.report["notices"]
    assert all(torch.isfinite(t.float()).all() for t in found.tensors.values())
    for layer, (mine, expected) in enumerate(
        zip(found.report["layers"], without.report["layers"], strict=True)
    ):
        same = (
            mine["seen_tokens"] == expected["seen_tokens"]
            and mine["routed_tokens"] == expected["routed_tokens"]
        )
        assert same == (layer in not_counted_in)
    ranges = without.scales()
    for name, value in found.scales().items():
        if int(name.split(".")[2]) in not_measured_in:
            assert bf16_steps(value, ranges[name]) <= AMAX_BF16_STEPS, name


def test_an_expert_that_overflows_where_it_is_not_routed_drops_no_row(run: Run) -> None:
    """Full coverage sends tokens where they would never go: such a token is left out of that one range."""

    def overflow(tensors: Tensors) -> None:
        only_the_loud_token_has_dimension_0(tensors)
        never_chosen(tensors)
        tensors[moe(0) + "e_score_correction_bias"][2] = -100
        tensors[moe(0) + "experts.2.w1.weight"][:, 0] = HUGE

    rows = ordinary_rows(6)
    found = run([*rows, [1, LOUD, 2, LOUD]], overflow)
    assert found.report["calibration"]["dropped_rows"] == []
    assert found.report["summary"]["non_finite_activations"] == 2
    assert found.report["layers"][0]["non_finite_activations"] == 2
    name = moe(0) + "experts.2.w2.input_scale"
    ordinary = run(rows, overflow).scale(name)
    assert ordinary <= found.scale(name) < 10 * ordinary


def test_more_than_a_tenth_stops(tmp_path: Path, run: Run) -> None:
    rows = ordinary_rows(9)
    assert run([*rows, [LOUD, 1]], values_overflow).report["calibration"]["dropped_rows"] == [9]
    with pytest.raises(
        CalibrationError, match="2 of 11 calibration rows gave NaN or Inf, more than 10%"
    ) as caught:
        run([*rows, [LOUD, 1], [2, LOUD]], values_overflow)
    assert caught.value.exit_code == 1
    assert "calibration data" in str(caught.value.hint)
    out = tmp_path / "2" / "out"
    assert [p.name for p in out.iterdir()] == [".m27quant"], "nothing that looks like a checkpoint"


def test_dropping_counts_rows_and_not_events() -> None:
    dropped = Dropped(10)
    dropped.add(3)
    dropped.add(3)
    assert dropped.sequences == {3}
    with pytest.raises(CalibrationError):
        dropped.add(4)


# -- maxima ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, -3.0, 2.0], 3.0), ([-0.0, 0.0], 0.0), ([], 0.0), ([1.0, float("-inf")], float("inf")), ([-1e-40], 1e-40)],
)  # fmt: skip
def test_amax_is_exact(values: list[float], expected: float) -> None:
    x = torch.tensor(values, dtype=torch.bfloat16)
    assert amax(x) == float(torch.tensor(expected, dtype=torch.bfloat16))


def test_amax_of_nan_is_nan() -> None:
    for at in range(3):
        x = torch.ones(3)
        x[at] = float("nan")
        assert amax(x) != amax(x)
