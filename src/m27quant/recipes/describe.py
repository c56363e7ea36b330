"""A recipe in words: what it makes of MiniMax-M2.7, structure by structure."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from m27quant.recipes.algorithm import Method
from m27quant.recipes.recipe import Recipe

M2_7_LAYERS, M2_7_EXPERTS = 62, 256

OPTIMIZES: dict[Method, str] = {
    "max": "nothing: a block's largest weight becomes 6, the largest value, as in NVIDIA's checkpoints",
    "mse": "the squared error of each block of 16 weights: of its 126 possible scales the best one is taken",
    "awmse": "the error of each expert's outputs: as mse, where a weight's error counts by the second moment of its "
    "input channel, over the expert's routed tokens and 256 of the average kind",
    "gptq": "the error of each expert's outputs, with correlations between channels: weights are rounded one column "
    "after the other, and what a column's rounding does to the outputs the columns behind it make good (GPTQ); block "
    "scales are the best for what is then to be stored",
}
COSTS: dict[Method, str] = {
    "max": "one pass over the weights",
    "mse": "packing takes a few times as long as with max; size and speed of the checkpoint are the same",
    "awmse": "as mse, and experts are read a second time once a layer's moments are known; nvidia-modelopt has no such "
    "algorithm; verify cannot repeat the choice without the moments, and says so",
    "gptq": "experts are read a second time, and packing takes a multiple of the time; Hessians of inputs are summed "
    "and factorized, each expert's kept in a scratch file: for M2.7 5 GB of disk and up to 1 GB of memory a process; "
    "weights are fitted to the calibration's tokens more than with the others; nvidia-modelopt's gptq keeps block "
    "scales from maxima and gives other bytes; verify cannot repeat the rounding without the Hessians, and says so",
}


def official_modules(layers: int = M2_7_LAYERS, experts: int = M2_7_EXPERTS) -> tuple[str, ...]:
    """Return the linear modules of an M2.x model, and its embedding, by their official names."""
    names = ["model.embed_tokens"]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        names += [f"{prefix}.self_attn.{p}_proj" for p in "qkvo"]
        names.append(f"{prefix}.block_sparse_moe.gate")
        names += [
            f"{prefix}.block_sparse_moe.experts.{e}.{w}" for e in range(experts) for w in ("w1", "w2", "w3")
        ]
    return (*names, "lm_head")


def describe(recipe: Recipe) -> dict[str, Any]:
    """Return `recipe` resolved for M2.7's layout as JSON values.

    Raises:
        RecipeError: it asks for what m27quant cannot write, or a pattern matches nothing.
    """
    resolved = recipe.resolve(official_modules())
    return {
        "name": recipe.name,
        "source": recipe.source,
        "description": recipe.description,
        "fingerprint": recipe.fingerprint(),
        "quantized": _structures(resolved.quantized, "NVFP4"),
        "unquantized": _structures(resolved.unquantized),
        "kv_cache": resolved.kv_cache,
        "algorithm": resolved.algorithm,
        "optimizes": OPTIMIZES[resolved.algorithm],
        "costs": COSTS[resolved.algorithm],
        "calibration": recipe.calibration.model_dump(mode="json"),
        "notices": list(resolved.notices),
    }


def _structures(modules: tuple[str, ...], becomes: str = "") -> list[dict[str, Any]]:
    counts = Counter(re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", name) for name in modules)
    return [{"modules": s, "count": count, "becomes": becomes or _kept(s)} for s, count in counts.items()]


def _kept(structure: str) -> str:
    """Attention leaves its FP8 blocks; everything else that is not quantized keeps its bytes."""
    return "BF16" if ".self_attn." in structure else "unchanged"
