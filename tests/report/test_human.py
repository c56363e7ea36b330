"""What people read: measurements as blocks of their own, and lines that fit their terminal."""

from __future__ import annotations

import math

import pytest

from m27quant.report import human
from m27quant.report.text import size
from tests.report.results import ALL, MANY, MIXED, result

LOGITS = {
    "text": "heldout.txt",
    "num_tokens": 2048,
    "num_windows": 8,
    "seq_len": 256,
    "activations": "nvfp4",
    "kv_cache": "fp8",
    "kl_mean": 0.0132,
    "kl_p99": 0.068,
    "kl_max": 0.297,
    "top1_agreement": 0.921,
    "perplexity_source": 16.825,
    "perplexity": 17.131,
    "perplexity_ratio": 1.01819,
    "layer_sqnr_db": [20.0 - layer / 4 for layer in range(10)],
    "worst_experts": [{"layer": 2, "expert": 11, "sqnr_db": 13.5}],
}
FACTS = {
    "num_shards": 2,
    "quant_algo": None,
    "weights": {"matrices": 384, "largest_code_share": 0.111619},
    "source": {"exact": 384, "sqnr_db": {"mean": 20.467, "min": 20.2}, "rows": [{"layer": 0}]},
    "logits": LOGITS,
    "serving_vllm": {"engine": "vLLM 0.33", "weights_per_gpu_bytes": 67_000_000_000},
    "serving_sglang": {"engine": "SGLang 0.5.23", "cache_tokens_that_fit": 337},
}


def test_measurements_have_blocks_of_their_own() -> None:
    assert human.render(result(facts=FACTS)) == (
        "checkpoint  out/m27\n"
        "level       default\n"
        "shards      2\n"
        "\n"
        "weights\n"
        "  matrices            384\n"
        "  largest code share  0.1116\n"
        "\n"
        "source\n"
        "  exact    384\n"
        "  SQNR dB  mean 20.47, min 20.2\n"
        "\n"
        "logits\n"
        "  text             heldout.txt: 2,048 tokens, 8 windows of at most 256\n"
        "  computed         experts' inputs in NVFP4 (W4A4), FP8 cache\n"
        "  KL divergence    mean 0.0132, 99% 0.068, largest 0.297 nats a token\n"
        "  likeliest token  the same for 92.1% of the tokens\n"
        "  perplexity       17.131, the source's 16.825: ratio 1.0182\n"
        "  SQNR of states, dB\n"
        "  layers 0-7          20.00  19.75  19.50  19.25  19.00  18.75  18.50  18.25\n"
        "  layers 8-9          18.00  17.75\n"
        "  worst experts, dB\n"
        "  layer 2, expert 11  13.50\n"
        "\n"
        "serving\n"
        "                         vllm       sglang\n"
        "  engine                 vLLM 0.33  SGLang 0.5.23\n"
        "  weights per GPU        67 GB\n"
        "  cache tokens that fit             337\n"
        "\n"
        "passed: no findings in 4 checks"
    )


def test_logits_that_could_not_be_computed_say_why() -> None:
    text = human.render(result(facts={"logits": {"not_computed": "a scale is missing"}}))
    assert "logits\n  not computed  a scale is missing\n" in text


def test_a_model_against_itself_has_no_noise() -> None:
    equal = LOGITS | {"layer_sqnr_db": [math.inf], "worst_experts": []}
    assert "  layer 0             equal\n" in human.render(result(facts={"logits": equal}))


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("name", ALL)
def test_lines_fit_the_terminal_or_have_no_place_to_break(name: str, width: int) -> None:
    whole, shown = human.render(ALL[name]), human.styled(ALL[name], width).plain
    for row in shown.split("\n"):
        assert len(row) <= width or " " not in row.strip() or len(row.split()[-1]) > width // 3
    assert "".join(shown.split()) == "".join(whole.split())


def test_a_wide_terminal_changes_nothing() -> None:
    for made in (MIXED, MANY):
        assert human.styled(made, 500).plain == human.render(made)


def test_values_go_on_below_where_they_began() -> None:
    rows = human.styled(MIXED, 40).plain.split("\n")
    at = next(n for n, row in enumerate(rows) if row.startswith("  engines    "))
    assert rows[at + 1].startswith(" " * 13)
    assert {span.style for span in human.styled(MIXED, 40).spans} == {
        span.style for span in human.styled(MIXED).spans
    }


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999 B"), (1000, "1 kB"), (134_534_000_000, "134.5 GB"), (2_000_000_000_000_000, "2,000 TB")],
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text
