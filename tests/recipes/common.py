"""Recipes as text, and the module names of small models."""

from __future__ import annotations

from pathlib import Path

from m27quant.recipes import BUILTIN, Recipe, load_recipe
from m27quant.recipes.algorithm import OWN_METHODS
from m27quant.recipes.describe import official_modules
from m27quant.recipes.loader import parse_recipe

MODELOPTS = tuple(n for n in BUILTIN if load_recipe(n).quantize.algorithm.method not in OWN_METHODS)
"""Built-in recipes that modelopt knows, too."""
MODULES = official_modules(layers=2, experts=3)

NVFP4 = "{num_bits: [2, 1], block_sizes: {-1: 16, type: dynamic, scale_bits: [4, 3]}}"
FP8 = "{num_bits: [4, 3]}"
KV = f"{{quantizer_name: '*[kv]_bmm_quantizer', cfg: {FP8}}}"
OFF = "{quantizer_name: '*', enable: false}"
EXPERTS = (
    f"{{quantizer_name: '*.experts.*weight_quantizer', cfg: {NVFP4}}}",
    f"{{quantizer_name: '*.experts.*input_quantizer', cfg: {NVFP4}}}",
)


def entry(pattern: str, cfg: str | None = None, **keys: str) -> str:
    parts = [f"quantizer_name: '{pattern}'"]
    parts += [f"cfg: {cfg}"] if cfg else []
    parts += [f"{key}: {value}" for key, value in keys.items()]
    return "{" + ", ".join(parts) + "}"


def recipe_text(*entries: str, algorithm: str = "max", more: str = "") -> str:
    """A recipe whose entry i is written in line 6 + i."""
    lines = [
        "metadata: {recipe_type: ptq}",
        "quantize:",
        f"  algorithm: {algorithm}",
        "  quant_cfg:",
        f"  - {OFF}",
        *(f"  - {e}" for e in entries),
    ]
    return "\n".join(lines) + "\n" + more


def parsed(text: str | bytes) -> Recipe:
    data = text.encode() if isinstance(text, str) else text
    return parse_recipe(data, label="r.yaml", name="r", source="r.yaml")


def written(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path
