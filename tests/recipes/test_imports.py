"""`imports` of a recipe: modelopt's collection, by name and by file; what cannot be imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from m27quant.errors import EnvironmentFault, RecipeError
from m27quant.recipes import BUILTIN, builtin_recipes, load_recipe
from m27quant.recipes.imports import library_root
from tests.recipes.common import EXPERTS, MODULES, entry, parsed, recipe_text, written

LIBRARY = "general/ptq/nvfp4_experts_only-kv_fp8"


def refused(text: str | bytes) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parsed(text)
    assert caught.value.exit_code == 2
    return caught.value


def test_a_library_recipe_by_name_with_suffix_and_by_file() -> None:
    by_name, with_suffix = load_recipe(LIBRARY), load_recipe(f"{LIBRARY}.yaml")
    by_file = load_recipe(Path(str(library_root())) / f"{LIBRARY}.yaml")
    assert by_name == with_suffix
    assert by_file.canonical() == by_name.canonical()
    assert by_file.resolve(MODULES).quantized == by_name.resolve(MODULES).quantized


def test_a_recipe_of_ones_own_may_import_from_the_library() -> None:
    text = (
        "imports:\n  none: configs/ptq/units/base_disable_all\n  nvfp4: configs/numerics/nvfp4\n"
        "  kv: configs/ptq/units/kv_fp8_cast.yaml\n"
        "metadata: {recipe_type: ptq}\n"
        "quantize:\n  quant_cfg:\n  - $import: none\n"
        "  - {quantizer_name: '*.experts.*weight_quantizer', cfg: {$import: nvfp4}}\n"
        "  - quantizer_name: '*.experts.*input_quantizer'\n"
        "    cfg: {$import: [nvfp4], effective_bits: 4.0}\n"
        "  - $import: kv\n"
    )
    resolved = parsed(text).resolve(MODULES)
    assert resolved.kv_cache == "fp8_cast"
    assert len(resolved.quantized) == 2 * 3 * 3


@pytest.mark.parametrize(
    "target",
    ["/etc/passwd", "../x", "configs/../../x", "configs/nothing", "configs", "", "a\\b", "'a\0b'"],
)
def test_imports_reach_the_library_only(target: str) -> None:
    text = f"imports: {{x: '{target}'}}\n" + recipe_text(*EXPERTS)
    if "\0" in target:
        assert "not valid YAML" in refused(text).message
    else:
        assert "is not in modelopt's recipe collection" in refused(text).message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("imports: [a]\n" + recipe_text(*EXPERTS), "`imports` must map names to files"),
        ("imports: {a: 1}\n" + recipe_text(*EXPERTS), "`imports` must map names to files"),
        (recipe_text("{$import: kv}"), "r.yaml:6: `$import: kv` names nothing that `imports` declares"),
        (recipe_text("{$import: [1, {}]}"), "names nothing"),
        (
            "imports: {kv: configs/ptq/units/kv_fp8}\n"
            + recipe_text("{quantizer_name: x, cfg: {$import: kv}}"),
            "`kv` is not a mapping",
        ),
    ],
)
def test_broken_imports(text: str, words: str) -> None:
    assert words in refused(text).message


def test_without_modelopt_everything_but_its_collection_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert len(builtin_recipes()) == len(BUILTIN)
    assert load_recipe(written(tmp_path, recipe_text(*EXPERTS))).resolve(MODULES).quantized
    with pytest.raises(RecipeError, match="no recipe is named"):
        load_recipe(LIBRARY)
    with pytest.raises(EnvironmentFault, match=r"r\.yaml:1: the recipe imports") as caught:
        parsed("imports: {x: configs/numerics/fp8}\n" + recipe_text(*EXPERTS))
    assert caught.value.hint == "pip install nvidia-modelopt"


def test_a_typo_in_an_import_suggests_the_declared_name() -> None:
    text = "imports: {kv_fp8: configs/ptq/units/kv_fp8}\n" + recipe_text(*EXPERTS, "{$import: kv_fp}")
    assert refused(text).hint == "did you mean `kv_fp8`?"


def test_keys_beside_an_import_win() -> None:
    text = "imports: {fp8: configs/numerics/fp8}\n" + recipe_text(
        *EXPERTS, entry("*[kv]_bmm_quantizer", "{$import: fp8, use_constant_amax: true}")
    )
    assert parsed(text).resolve(MODULES).kv_cache == "fp8_cast"
    with pytest.raises(RecipeError, match="one scale per channel"):
        parsed(text.replace("use_constant_amax: true", "axis: 0")).resolve(MODULES)
