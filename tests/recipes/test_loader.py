"""Names, aliases and files; what a file may say; where a message points."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from m27quant.errors import RecipeError
from m27quant.recipes import ALIASES, BUILTIN, RecipeFile, builtin_recipes, load_recipe
from m27quant.recipes.describe import describe
from m27quant.recipes.schema import DEFAULT_DATASETS
from m27quant.recipes.strict_yaml import MAX_BYTES
from tests.recipes.common import EXPERTS, MODELOPTS, NVFP4, entry, parsed, recipe_text, written

LIBRARY = "general/ptq/nvfp4_experts_only-kv_fp8"


def refused(text: str | bytes) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parsed(text)
    assert caught.value.exit_code == 2
    return caught.value


def test_builtin_recipes_load_and_are_listed() -> None:
    assert tuple(r.name for r in builtin_recipes()) == BUILTIN
    assert all(r.source == "builtin" and r.description and not r.notices for r in builtin_recipes())


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_alias_and_name_are_one_recipe(alias: str, name: str) -> None:
    assert load_recipe(alias) == load_recipe(name)
    assert load_recipe(alias).fingerprint() == load_recipe(name).fingerprint()


def test_a_copy_in_a_file_has_the_same_fingerprint(tmp_path: Path) -> None:
    builtin = load_recipe(BUILTIN[0])
    file = Path(sys.modules["m27quant.recipes.loader"].__file__ or "").parent / f"{BUILTIN[0]}.yaml"
    copy = load_recipe(written(tmp_path, "# another comment\n" + file.read_text()))
    assert copy.canonical() == builtin.canonical()
    assert copy.source != builtin.source


def test_fingerprints_differ_where_results_do() -> None:
    recipes = builtin_recipes()
    shorter = recipes[0].with_calibration(seq_len=256)
    natural = recipes[0].with_calibration(moe_calib="natural")
    assert len({r.fingerprint() for r in (*recipes, shorter, natural)}) == len(recipes) + 2


def test_canonical_is_json() -> None:
    for recipe in (
        *builtin_recipes(),
        load_recipe(LIBRARY),
        load_recipe("general/ptq/nvfp4_default-kv_nvfp4_cast"),
    ):
        assert json.loads(json.dumps(recipe.canonical(), allow_nan=False)) == recipe.canonical()


def test_default_calibration_is_that_of_modelopt() -> None:
    calibration = load_recipe(BUILTIN[0]).calibration
    assert (calibration.num_samples, calibration.seq_len, calibration.moe_calib) == (1024, 512, "full")
    news, nemotron = calibration.datasets
    assert (news.path, news.config, news.splits, news.field) == (
        "abisee/cnn_dailymail",
        "3.0.0",
        ("train",),
        "article",
    )
    assert (nemotron.path, nemotron.splits) == (
        "nvidia/Nemotron-Post-Training-Dataset-v2",
        ("stem", "chat", "math", "code"),
    )
    assert nemotron.chat == "join"
    assert news.weight == nemotron.weight


@pytest.mark.parametrize(
    "name", ["nvfp4_exprts_only", "nvfp4_experts_only-kv_fp9", "nvfp4_experts_only-fp8_kv.yml"]
)
def test_an_unknown_name_suggests_the_closest(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert caught.value.message == f"no recipe is named `{name}`, and there is no such file"
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean `nvfp4_experts_only")


@pytest.mark.parametrize("name", ["", "q" * 5000, "a\0b", "../../etc/passwd.yaml", "\x1b[2J", "/", "."])
def test_names_that_are_nothing(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert caught.value.message.isprintable()


def test_what_is_not_a_readable_file(tmp_path: Path) -> None:
    fifo, big, folder = tmp_path / "fifo.yaml", tmp_path / "big.yaml", tmp_path / "folder.yaml"
    os.mkfifo(fifo)
    folder.mkdir()
    with big.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it whole would need a terabyte
    for path, words in (
        (fifo, "not a regular file"),
        (folder, "not a regular file"),
        (big, f"{MAX_BYTES} bytes"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_recipe(path)


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = written(tmp_path, recipe_text(*EXPERTS))
    monkeypatch.setattr(Path, "open", denied)  # chmod would not stop root
    with pytest.raises(RecipeError, match="cannot be read: Permission denied"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "[1]", "text", "a: 1\n---\nb: 2\n"])
def test_what_is_not_one_mapping(text: str) -> None:
    assert "a recipe is one YAML mapping" in refused(text).message


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            recipe_text(*EXPERTS, more="calibraton: {}\n"),
            "r.yaml:8: calibraton: unknown key `calibraton`",
            "did you mean `calibration`?",
        ),
        (
            recipe_text(entry("*lm_head*", enabled="false")),
            "r.yaml:6: quantize.quant_cfg.1.enabled: unknown key `enabled`",
            "did you mean `enable`?",
        ),
        (
            recipe_text(entry("*.experts.*", "{num_bit: 4}")),
            "r.yaml:6: quantize.quant_cfg.1.cfg.num_bit: unknown key `num_bit`",
            "did you mean `num_bits`?",
        ),
        (
            recipe_text(entry("*.experts.*", "{block_sizes: {-1: 16, scale_bit: e4m3}}")),
            "r.yaml:6: quantize.quant_cfg.1.cfg.block_sizes.scale_bit: unknown key `scale_bit`",
            "did you mean `scale_bits`?",
        ),
        (
            recipe_text(*EXPERTS, algorithm="{method: max, layerwize: {}}"),
            "r.yaml:3: quantize.algorithm.layerwize: unknown key `layerwize`",
            "did you mean `layerwise`?",
        ),
        (
            recipe_text(*EXPERTS, more="calibration:\n  seq_len: 512\n  samples: 8\n"),
            "r.yaml:10: calibration.samples: unknown key `samples`",
            "did you mean `num_samples`?",
        ),
        (
            recipe_text(*EXPERTS, more="calibration: {datasets: [{path: x, spilts: [a]}]}\n"),
            "r.yaml:8: calibration.datasets.0.spilts: unknown key `spilts`",
            "did you mean `splits`?",
        ),
        (
            recipe_text("{'*weight_quantizer': {num_bits: 8}}"),
            "r.yaml:6: quantize.quant_cfg.1.*weight_quantizer: unknown key `*weight_quantizer`",
            "did you mean `quantizer_name`?",
        ),
    ],
)
def test_an_unknown_key_names_file_line_and_closest_key(text: str, message: str, hint: str) -> None:
    error = refused(text)
    assert error.message.partition(" (and ")[0] == message
    assert error.hint == hint


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("num_samples: '8'", "r.yaml:9: calibration.num_samples: input should be a valid integer, not `8`"),
        ("num_samples: 8.0", "calibration.num_samples: input should be a valid integer, not `8.0`"),
        ("num_samples: true", "calibration.num_samples: input should be a valid integer, not `True`"),
        ("num_samples: 0", "greater than or equal to 1, not `0`"),
        ("num_samples: -1024", "greater than or equal to 1, not `-1024`"),
        ("num_samples: .nan", "`.nan` is not a finite decimal number"),
        ("num_samples: .inf", "`.inf` is not a finite decimal number"),
        ("seq_len: 1e3", "`1e3` means different things"),
        ("seq_len: 01000", "`01000` means different things"),
        ("seq_len: 0x200", "`0x200` means different things"),
        ("seq_len: null", "input should be a valid integer, not `None`"),
        ("moe_calib: off", "`off` means different things"),
        ("moe_calib: ful", "input should be 'full' or 'natural', not `ful`"),
        ("datasets: []", "at least 1 item"),
        (
            "datasets: [{path: x, config: 3.0}]",
            "datasets.0.config: input should be a valid string, not `3.0`",
        ),
        (
            "datasets: [{path: x, splits: train}]",
            "datasets.0.splits: input should be a valid tuple, not `train`",
        ),
        ("datasets: [{config: x}]", "calibration.datasets.0.path: required, but missing"),
        ("datasets: [{path: x, weight: 0}]", "greater than or equal to 1"),
        ("num_samples: 1\n  num_samples: 2", "r.yaml:10: key `num_samples` appears twice"),
    ],
)
def test_calibration_is_typed(section: str, words: str) -> None:
    assert words in refused(recipe_text(*EXPERTS, more=f"calibration:\n  {section}\n")).message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (recipe_text(entry("*.experts.*", "{}")), "`*.experts.*` has an empty `cfg`"),
        (recipe_text(entry("*.experts.*")), "`*.experts.*` says neither `cfg` nor `enable`"),
        (recipe_text(entry("*.experts.*", "{num_bits: 4, enable: true}")), "sets `enable` inside `cfg`"),
        (recipe_text(entry("*.experts.*", "{constant_amax: -1.0}")), "greater than 0, not `-1.0`"),
        (recipe_text(entry("*.experts.*", "{block_sizes: {-1: 0}}")), "at least one element, not 0"),
        (recipe_text(entry("", NVFP4)), "at least 1 character"),
        (recipe_text(entry("*" * 300, NVFP4)), "at most 256 characters"),
        (recipe_text(*[entry("*lm_head*", enable="false")] * 300), "at most 256 items"),
        ("metadata: {recipe_type: ptq}\n", "r.yaml:1: quantize: required, but missing"),
        ("quantize: {quant_cfg: [{quantizer_name: a, enable: true}]}\n", "r.yaml:1: metadata: required"),
        (
            "metadata: {recipe_type: qad}\nquantize: {}\n",
            "metadata.recipe_type: input should be 'ptq', not `qad`",
        ),
    ],
)
def test_quantize_is_typed(text: str, words: str) -> None:
    assert words in refused(text).message


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("mse", "`mse` without `fp8_scale_sweep: true` is not supported"),
        ("{method: max, fp8_scale_sweep: true}", "`fp8_scale_sweep` goes with `method: mse`"),
        ("svdquant", "algorithm `svdquant` is not supported"),
        ("awq_lite", "algorithm `awq_lite` is not supported"),
        ("{method: svdquant, lowrank: 32}", "algorithm `svdquant` is not supported"),
        ("{method: gptq, perc_damp: 0.1}", "`perc_damp: 0.1` is not supported"),
        ("{method: mse, fp8_scale_sweep: true, block_size: 128}", "`block_size` goes with `method: gptq`"),
        ("{method: gptq, layerwise: {enable: true}}", "is not supported"),
        ("null", "algorithm `null` is not supported"),
        ("[max, mse]", "a chain of algorithms is not supported"),
        ("{}", "quantize.algorithm.method: required, but missing"),
        ("{method: max, sync_expert_weight_amax: true}", "sync_expert_weight_amax: input should be False"),
        (
            "{method: max, shared_states: {weight_global_amax: {patterns: ['(a+)+$']}}}",
            "shared_states: input",
        ),
        (
            "{method: max, layerwise: {enable: true, get_qdq_activations_from_prev_layer: true}}",
            "not supported",
        ),
        ("{method: max, moe_calib_experts_ratio: 0.25}", "`moe_calib_experts_ratio: 0.25` is not supported"),
        ("{method: max, moe_calib_experts_ratio: 0.0}", "greater than 0"),
        ("{method: max, moe_calib_experts_ratio: 1.5}", "less than or equal to 1"),
    ],
)
def test_other_algorithms_are_refused_by_name(algorithm: str, words: str) -> None:
    error = refused(recipe_text(*EXPERTS, algorithm=algorithm))
    assert error.message.startswith("r.yaml:3: ")
    assert words in error.message


@pytest.mark.parametrize(
    "layerwise", ["{enable: true}", "{enable: true, checkpoint_dir: /x, save_every: 2}", "null"]
)
def test_layerwise_does_not_change_the_recipe(layerwise: str) -> None:
    plain, layered = (
        recipe_text(*EXPERTS),
        recipe_text(*EXPERTS, algorithm=f"{{method: max, layerwise: {layerwise}}}"),
    )
    assert parsed(layered).fingerprint() == parsed(plain).fingerprint()


def test_full_coverage_is_the_default_and_said() -> None:
    silent = parsed(recipe_text(*EXPERTS))
    assert silent.moe_calib == "full"
    assert "sets no moe_calib_experts_ratio" in silent.notices[0]
    asked = parsed(recipe_text(*EXPERTS, algorithm="{method: max, moe_calib_experts_ratio: 1.0}"))
    assert (asked.moe_calib, asked.notices) == ("full", ())
    natural = parsed(recipe_text(*EXPERTS, more="calibration: {moe_calib: natural}\n"))
    assert (natural.moe_calib, natural.notices) == ("natural", ())
    assert "on routed tokens only" in asked.with_calibration(moe_calib="natural").notices[0]
    assert silent.with_calibration(num_samples=4).notices == silent.notices


def test_ratio_and_moe_calib_must_agree() -> None:
    text = recipe_text(
        *EXPERTS,
        algorithm="{method: max, moe_calib_experts_ratio: 1.0}",
        more="calibration: {moe_calib: natural}\n",
    )
    assert "contradicts" in refused(text).message


def test_with_calibration_is_checked() -> None:
    recipe = load_recipe(BUILTIN[0])
    assert recipe.with_calibration(num_samples=8, seq_len=None).calibration.num_samples == 8
    assert recipe.with_calibration(seq_len=None) == recipe
    assert recipe.with_calibration(datasets=DEFAULT_DATASETS[:1]).calibration.datasets == DEFAULT_DATASETS[:1]
    with pytest.raises(RecipeError, match=r"calibration\.num_samples"):
        recipe.with_calibration(num_samples=0)
    with pytest.raises(RecipeError, match="unknown key `num_sample`"):
        recipe.with_calibration(num_sample=1)


def test_recipes_cannot_be_changed() -> None:
    recipe = load_recipe(BUILTIN[0])
    with pytest.raises(AttributeError):
        recipe.name = "x"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        recipe.calibration.num_samples = 1  # type: ignore[misc]


def test_modelopt_yaml_is_the_recipe_without_imports_and_calibration() -> None:
    for name in (*MODELOPTS, LIBRARY):
        recipe = load_recipe(name)
        again = parsed(recipe.modelopt_yaml())
        assert again.quantize == recipe.quantize
        assert again.description == recipe.description
        assert set(yaml.safe_load(recipe.modelopt_yaml())) == {"metadata", "quantize"}


def test_an_algorithm_of_our_own_is_not_passed_off_as_modelopts() -> None:
    recipe = load_recipe("nvfp4_experts_only_awmse-fp8_kv")
    with pytest.raises(RecipeError, match="nvidia-modelopt has no algorithm `awmse`"):
        recipe.modelopt_yaml()
    assert "nvidia-modelopt has no such algorithm" in describe(recipe)["costs"]


def test_json_schema_accepts_the_builtin_recipes_and_refuses_typos() -> None:
    validator = jsonschema.Draft202012Validator(RecipeFile.model_json_schema())
    for name in MODELOPTS:
        document = json.loads(json.dumps(load_recipe(name).modelopt()))
        validator.validate(document)
        document["quantise"] = {}
        assert not validator.is_valid(document)


def test_no_torch_on_this_path() -> None:
    script = (
        "import sys\n"
        "from m27quant.recipes import load_recipe\n"
        "from m27quant.recipes.describe import describe\n"
        f"for name in ({BUILTIN[0]!r}, {LIBRARY!r}): describe(load_recipe(name))\n"
        "assert not {'torch', 'modelopt', 'modelopt_recipes', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
