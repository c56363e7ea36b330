"""Recipes: which modules become what, calibrated on which data.

A recipe is a nvidia-modelopt PTQ recipe (`metadata`, `quantize`, perhaps `imports` from modelopt's collection), so
that one file drives both programs; the built-in ones load with `modelopt.recipe.load_recipe` as they are.  What
modelopt has no place for, the calibration data, may stand in a `calibration` section and otherwise has defaults;
modelopt refuses unknown sections, so `Recipe.modelopt()` gives it the rest.

Where the two differ: m27quant calibrates every expert on every token unless told `moe_calib: natural` (a notice
says so where modelopt would not); a pattern of your own that matches nothing is an error; values that YAML readers
take differently are refused; and what m27quant cannot write is refused, never ignored.

>>> load_recipe("nvfp4_experts_only-fp8_kv").resolve(module_names).kv_cache
'fp8'
"""

from m27quant.recipes.loader import ALIASES, BUILTIN, builtin_recipes, load_recipe
from m27quant.recipes.recipe import Recipe
from m27quant.recipes.resolve import ResolvedRecipe
from m27quant.recipes.schema import Calibration, Dataset, RecipeFile

__all__ = [
    "ALIASES",
    "BUILTIN",
    "Calibration",
    "Dataset",
    "Recipe",
    "RecipeFile",
    "ResolvedRecipe",
    "builtin_recipes",
    "load_recipe",
]
