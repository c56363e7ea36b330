"""Recipes: which modules become what, calibrated on which data.

>>> recipe = load_recipe("nvfp4_experts_only-fp8_kv")
>>> recipe.resolve(["lm_head", *...]).kv_cache
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
