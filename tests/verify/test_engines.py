"""Exclude lists as vLLM and SGLang read them: the table was made with both packages' own functions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from m27quant.verify.engines import ENGINES, EXPERTS, Answer, Engine, ExcludeList

LAYERS = range(12)
ATTENTION = [f"model.layers.{i}.self_attn*" for i in LAYERS]
GATES = [f"model.layers.{i}.block_sparse_moe.gate" for i in LAYERS]
GOOD = ["lm_head", *GATES, *ATTENTION]


def exact(*projections: str) -> list[str]:
    return [f"model.layers.{i}.self_attn.{p}" for i in LAYERS for p in projections]


@dataclass(frozen=True)
class Row:
    """An exclude list and what an engine makes of qkv, o, the experts and the head."""

    patterns: list[str]
    qkv: Answer = "excluded"
    o: Answer = "excluded"
    experts: Answer = "quantized"
    head: Answer = "excluded"


def both(row: Row) -> dict[Engine, Row]:
    return {"vllm": row, "sglang": row}


REST = ["lm_head", *GATES]
TABLE: dict[str, dict[Engine, Row]] = {
    "NVIDIA's": both(Row(GOOD)),
    "exact names": both(Row([*REST, *exact("q_proj", "k_proj", "v_proj", "o_proj")])),
    "*self_attn*": both(Row([*REST, "*self_attn*"])),
    "self_attn": both(Row([*REST, "self_attn"])),
    "q, k and o without v": both(Row([*REST, *exact("q_proj", "k_proj", "o_proj")], qkv="mixed")),
    "globs of projections": both(
        Row([*REST, *(f"*.self_attn.{p}_proj" for p in "qkvo")], qkv="quantized", o="excluded")
    ),
    "regular expression": both(Row([*REST, "re:.*self_attn.*"], qkv="quantized", o="quantized")),
    "*mlp*": {
        "vllm": Row([*GOOD, "*mlp*"], experts="excluded"),
        "sglang": Row([*GOOD, "*mlp*"]),
    },
    "*block_sparse_moe*": {
        "vllm": Row([*GOOD, "*block_sparse_moe*"]),
        "sglang": Row([*GOOD, "*block_sparse_moe*"], experts="excluded"),
    },
    "lm_head missing": both(Row([*GATES, *ATTENTION], head="quantized")),
    "empty": both(Row([], qkv="quantized", o="quantized", head="quantized")),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", TABLE)
def test_rows(name: str, engine: Engine) -> None:
    row = TABLE[name][engine]
    excluded = ExcludeList(engine, row.patterns)
    for layer in LAYERS:
        prefix = f"model.layers.{layer}"
        assert excluded.module(f"{prefix}.self_attn.qkv_proj") == row.qkv
        assert excluded.module(f"{prefix}.self_attn.o_proj") == row.o
        assert excluded.module(f"{prefix}.{EXPERTS[engine]}") == row.experts
    if engine == "vllm":  # SGLang never quantizes the head
        assert excluded.module("lm_head") == row.head


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pattern_for_layer_1_hits_layers_10_to_19(engine: Engine) -> None:
    excluded = ExcludeList(engine, [*GOOD, "model.layers.1*"])
    for layer in LAYERS:
        answer = excluded.module(f"model.layers.{layer}.{EXPERTS[engine]}")
        assert answer == ("excluded" if str(layer).startswith("1") else "quantized")


def test_vllm_excludes_all_experts_of_a_layer_for_one_named_expert() -> None:
    excluded = ExcludeList("vllm", ["model.layers.3.mlp.experts.0.w1"])
    assert excluded.module("model.layers.3.mlp.experts") == "excluded"
    assert excluded.module("model.layers.4.mlp.experts") == "quantized"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("pattern", ["", "*", "[", "[z-a]*", "(*", "a" * 5000 + "*" * 50, "\x00*", "?*[!"])
def test_hostile_patterns_give_an_answer(engine: Engine, pattern: str) -> None:
    answer = ExcludeList(engine, [pattern]).module("model.layers.0.self_attn.qkv_proj")
    assert answer in ("excluded", "quantized")
