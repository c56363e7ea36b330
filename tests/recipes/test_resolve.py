"""From patterns to modules, and the refusal of what m27quant does not write."""

from __future__ import annotations

import random
import re
import time

import pytest

from m27quant.errors import RecipeError
from m27quant.recipes import BUILTIN, load_recipe
from m27quant.recipes.algorithm import METHODS
from m27quant.recipes.describe import describe, official_modules
from tests.recipes.common import EXPERTS, FP8, MODULES, NVFP4, entry, parsed, recipe_text

EXPERT = re.compile(r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w[123]")
KV = entry("*[kv]_bmm_quantizer", FP8)
NORMS = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_norm")


def refused(*entries: str, modules: tuple[str, ...] = MODULES) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parsed(recipe_text(*entries)).resolve(modules)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_recipes_quantize_all_experts_and_nothing_else(name: str) -> None:
    kv_cache = "fp8_cast" if name.endswith("_cast") else "fp8" if "fp8_kv" in name else None
    algorithm = next((a for a in METHODS if f"_{a}-" in name), "max")
    modules = (*NORMS, *official_modules(layers=3, experts=5))
    resolved = load_recipe(name).resolve(modules)
    assert resolved.quantized == tuple(m for m in modules if EXPERT.fullmatch(m))
    assert resolved.unquantized == tuple(m for m in modules if not EXPERT.fullmatch(m))
    assert (resolved.kv_cache, resolved.algorithm, resolved.moe_calib) == (kv_cache, algorithm, "full")
    assert resolved.notices == ()


def test_m2_7_resolves_in_under_a_second() -> None:
    modules = official_modules()
    assert len(modules) == 47_927 + 1  # Linear modules of M2.7, and the embedding
    library = load_recipe("general/ptq/nvfp4_experts_only-kv_fp8")
    for recipe in (load_recipe(BUILTIN[0]), library):
        started = time.process_time()
        resolved = recipe.resolve(modules)
        assert time.process_time() - started < 1
        assert len(resolved.quantized) == 62 * 256 * 3
        assert resolved.unquantized == tuple(m for m in modules if not EXPERT.fullmatch(m))


def test_order_of_modules_is_kept_and_repeats_count_once() -> None:
    shuffled = random.Random(0).sample(MODULES, len(MODULES))
    resolved = load_recipe(BUILTIN[0]).resolve(iter([*shuffled, *shuffled]))
    assert resolved.quantized == tuple(m for m in shuffled if EXPERT.fullmatch(m))


def test_later_entries_win() -> None:
    wrong_first = (entry("*", "{num_bits: 8}"), entry("*", enable="false"), *EXPERTS)
    assert len(parsed(recipe_text(*wrong_first)).resolve(MODULES).quantized) == 18
    off_last = (*EXPERTS, entry("*.experts.*", enable="false"))
    assert "quantizes no expert" in refused(*off_last).message


def test_enable_without_cfg_keeps_the_format() -> None:
    entries = (*EXPERTS, KV, entry("*", enable="false"), entry("*.experts.*weight_quantizer", enable="true"))
    resolved = parsed(recipe_text(*entries, entry("*.experts.*input_quantizer", enable="true"))).resolve(
        MODULES
    )
    assert len(resolved.quantized) == 18
    assert resolved.kv_cache is None


def test_cfg_counts_even_where_it_is_switched_off() -> None:
    asleep = [e[:-1] + ", enable: false}" for e in EXPERTS]
    awake = entry("*.experts.*t_quantizer", enable="true")
    idle = entry("*output_quantizer", enable="false")
    assert len(parsed(recipe_text(*asleep, awake, idle)).resolve(MODULES).quantized) == 18


def test_patterns_that_read_digits() -> None:
    by_number = [entry(f"*.w{i}.{q}_quantizer", NVFP4) for i in (1, 2, 3) for q in ("weight", "input")]
    assert len(parsed(recipe_text(*by_number)).resolve(MODULES).quantized) == 18
    by_class = [entry(f"*.experts.[0-2].w?.{q}_quantizer", NVFP4) for q in ("weight", "input")]
    assert len(parsed(recipe_text(*by_class)).resolve(MODULES).quantized) == 18
    negated = [entry(f"*.experts.*.[!x]?.{q}_quantizer", NVFP4) for q in ("weight", "input")]
    assert len(parsed(recipe_text(*negated)).resolve(MODULES).quantized) == 18


def test_character_class_reaches_k_and_v_only() -> None:
    assert parsed(recipe_text(*EXPERTS, KV)).resolve(MODULES).kv_cache == "fp8"
    assert "queries" in refused(*EXPERTS, entry("*[qkv]_bmm_quantizer", FP8)).message


def test_many_patterns_and_many_modules_stay_fast() -> None:
    hostile = [entry("*a*a*a*a*a*a*a*a*a*a*a*a*a*b?", enable="false")]
    started = time.process_time()
    assert "matches nothing" in refused(*EXPERTS, *hostile, modules=(*MODULES, "a" * 200)).message
    assert time.process_time() - started < 1


class TestNothingMatches:
    @pytest.mark.parametrize(
        ("pattern", "near"),
        [
            ("*.expert.*weight_quantizer", ".block_sparse_moe.experts.0.w"),
            ("*slef_attn.q_proj*", ".self_attn.q_proj."),
            ("*[kv]_bmm_quantiser", "_bmm_quantizer"),
            ("lm_haed*", "lm_head."),
            ("*.layers.77.*gate*", ".gate."),
        ],
    )
    @pytest.mark.parametrize("does", [{"cfg": NVFP4}, {"enable": "false"}])
    def test_names_pattern_line_and_closest_module(
        self, pattern: str, near: str, does: dict[str, str]
    ) -> None:
        error = refused(*EXPERTS, entry(pattern, **does))
        assert error.message == f"r.yaml:8: pattern `{pattern}` matches nothing in this model"
        assert error.hint is not None
        assert error.hint.startswith("the closest name is ")
        assert near in error.hint

    def test_a_pattern_for_modules_instead_of_quantizers(self) -> None:
        assert "experts.0.w1." in (refused(entry("*.experts.*.w1", NVFP4)).hint or "")

    def test_parent_class(self) -> None:
        error = refused(*EXPERTS, entry("*", enable="false", parent_class="nn.Liner"))
        assert (
            error.message
            == "r.yaml:8: pattern `*` with parent_class `nn.Liner` matches nothing in this model"
        )
        assert error.hint == "did you mean `nn.Linear`?"
        linear_only = [e.replace("}}}", "}}, parent_class: nn.Linear}") for e in EXPERTS]
        assert len(parsed(recipe_text(*linear_only)).resolve(MODULES).quantized) == 18
        embedding = refused(*EXPERTS, entry("*", NVFP4, parent_class="nn.Embedding")).message
        assert "model.embed_tokens" in embedding
        assert "the embedding cannot be quantized" in embedding

    def test_a_model_without_modules(self) -> None:
        assert "matches nothing" in refused(*EXPERTS, modules=()).message

    def test_snippets_of_modelopt_may_match_nothing(self) -> None:
        text = "imports: {off: configs/ptq/units/default_disabled_quantizers}\n".replace("off", "rest")
        recipe = parsed(text + recipe_text(*EXPERTS, "{$import: rest}"))
        assert len(recipe.resolve(MODULES).quantized) == 18


class TestRefusals:
    @pytest.mark.parametrize(
        ("pattern", "module", "words"),
        [
            (
                "*self_attn.o_proj.weight_quantizer",
                "model.layers.0.self_attn.o_proj",
                "attention cannot be quantized",
            ),
            (
                "*block_sparse_moe.gate.*",
                "model.layers.0.block_sparse_moe.gate",
                "the router cannot be quantized",
            ),
            ("*lm_head*", "lm_head", "the head cannot be quantized"),
            ("*embed_tokens*", "model.embed_tokens", "the embedding cannot be quantized"),
            ("*norm*", "model.norm", "a norm cannot be quantized"),
            ("*.q_bmm_quantizer", "model.layers.0.self_attn.q_bmm_quantizer", "queries and attention"),
            (
                "*.experts.*output_quantizer",
                "model.layers.0.block_sparse_moe.experts.0.w1",
                "outputs of experts",
            ),
        ],
    )
    def test_other_modules(self, pattern: str, module: str, words: str) -> None:
        error = refused(*EXPERTS, entry(pattern, NVFP4), modules=(*MODULES, *NORMS))
        assert error.message.startswith(f"r.yaml:8: pattern `{pattern}`: {module}")
        assert words in error.message
        assert "NVFP4" in (error.hint or "")

    @pytest.mark.parametrize(
        ("cfg", "words"),
        [
            ("{num_bits: 8}", "INT8 is not supported for experts"),
            (FP8, "FP8 is not supported"),
            ("{num_bits: [5, 2]}", "E5M2 is not supported"),
            ("{num_bits: [2, 1]}", "E2M1 is not supported"),
            ("{num_bits: nvfp4}", "`nvfp4` is not supported"),
            (
                "{num_bits: e2m1, block_sizes: {-1: 32, type: dynamic, scale_bits: e4m3}}",
                "dynamic blocks of 32",
            ),
            (
                "{num_bits: e2m1, block_sizes: {-1: 16, type: static, scale_bits: e4m3}}",
                "static blocks of 16",
            ),
            (
                "{num_bits: e2m1, block_sizes: {-1: 16, type: dynamic, scale_bits: [8, 0]}}",
                "without E4M3 scales",
            ),
            (
                "{num_bits: e2m1, block_sizes: {-1: 16, type: dynamic, scale_bits: e4m3, "
                "four_over_six: true}}",
                "four_over_six",
            ),
            ("{num_bits: [4, 3], axis: 0}", "one scale per channel"),
            (NVFP4[:-1] + ", type: dynamic}", "NVFP4 with a dynamic tensor scale"),
            (NVFP4[:-1] + ", constant_amax: 2688.0}", "NVFP4 with constant_amax"),
            (NVFP4[:-1] + ", use_constant_amax: true}", "NVFP4 with use_constant_amax"),
            (NVFP4[:-1] + ", rotate: true}", "NVFP4 with a rotation"),
            (NVFP4[:-1] + ", rotate: {enable: true}}", "NVFP4 with a rotation"),
            (NVFP4[:-1] + ", bias: {-1: null, type: static}}", "NVFP4 with a bias"),
            (NVFP4[:-1] + ", calibrator: histogram}", "NVFP4 with the histogram calibrator"),
            (NVFP4[:-1] + ", backend: x}", "NVFP4 with a custom backend"),
            (f"[{NVFP4}, {FP8}]", "a sequence of quantizers"),
        ],
    )
    def test_other_formats_for_experts(self, cfg: str, words: str) -> None:
        error = refused(*EXPERTS, entry("*.experts.*input_quantizer", cfg))
        assert error.message.startswith("r.yaml:8: pattern `*.experts.*input_quantizer`: model.layers.0.")
        assert words in error.message

    @pytest.mark.parametrize(
        ("cfg", "words"),
        [
            (NVFP4, "NVFP4 is not supported for the KV cache"),
            ("{num_bits: 8}", "INT8"),
            (FP8[:-1] + ", bias: {-2: null, -4: null, type: static}}", "a bias (affine)"),
            (FP8[:-1] + ", constant_amax: 448.0}", "constant_amax"),
            (FP8[:-1] + ", axis: -1}", "one scale per channel"),
        ],
    )
    def test_other_formats_for_the_cache(self, cfg: str, words: str) -> None:
        assert words in refused(*EXPERTS, entry("*[kv]_bmm_quantizer", cfg)).message

    @pytest.mark.parametrize(
        ("entries", "words"),
        [
            (EXPERTS[:1], "w1.input_quantizer: is off while weight_quantizer is on; weights only"),
            (EXPERTS[1:], "w1.weight_quantizer: is off while input_quantizer is on; inputs only"),
            ((*EXPERTS, entry("*.w3.*", enable="false")), "w3.input_quantizer: is off while model.layers.0."),
            (
                (*EXPERTS, entry("*.experts.2.*", enable="false")),
                "experts.2.w1.input_quantizer: is off while",
            ),
            (
                (*EXPERTS, entry("*.layers.1.*", enable="false")),
                "layers.1.block_sparse_moe.experts.0.w1.input",
            ),
            (
                tuple(e.replace("*.experts", "*.layers.0.*.experts") for e in EXPERTS),
                "layers.1.block_sparse_moe.experts.0.w1.input_quantizer: is off while model.layers.0.",
            ),
        ],
    )
    def test_halves(self, entries: tuple[str, ...], words: str) -> None:
        error = refused(*entries)
        assert words in error.message
        assert "is not supported" in error.message

    @pytest.mark.parametrize(
        "entries",
        [
            (entry("*k_bmm_quantizer", FP8),),
            (KV, entry("*layers.1.*v_bmm_quantizer", enable="false")),
            (KV, entry("*v_bmm_quantizer", FP8[:-1] + ", use_constant_amax: true}")),
        ],
    )
    def test_half_a_cache(self, entries: tuple[str, ...]) -> None:
        assert "K and V of all layers go alike" in refused(*EXPERTS, *entries).message

    def test_a_recipe_that_does_not_begin_by_switching_everything_off(self) -> None:
        text = recipe_text(*EXPERTS).replace(entry("*", enable="false"), entry("*.gate.*", enable="false"))
        with pytest.raises(RecipeError, match="modelopt's default INT8") as caught:
            parsed(text).resolve(MODULES)
        assert "begin quant_cfg with" in (caught.value.hint or "")


def test_describe_says_what_becomes_of_each_structure() -> None:
    document = describe(load_recipe(BUILTIN[1]))
    assert document["kv_cache"] == "fp8_cast"
    assert {row["modules"]: row["count"] for row in document["quantized"]} == {
        f"model.layers.*.block_sparse_moe.experts.*.w{i}": 62 * 256 for i in (1, 2, 3)
    }
    becomes = {row["modules"].rpartition(".")[2]: row["becomes"] for row in document["unquantized"]}
    assert becomes == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "BF16"),
        **dict.fromkeys(("embed_tokens", "gate", "lm_head"), "unchanged"),
    }


def test_one_entry_per_layer_is_affordable() -> None:
    layers = [entry(f"*.layers.{i}.*.experts.*t_quantizer", NVFP4) for i in range(62)]
    idle = entry("*output_quantizer", enable="false")
    modules = official_modules(layers=62, experts=32)
    started = time.process_time()
    resolved = parsed(recipe_text(*layers, idle)).resolve(modules)
    assert time.process_time() - started < 5
    assert len(resolved.quantized) == 62 * 32 * 3
