"""Finding and reading recipes: built-in names, their aliases, files, and modelopt's own collection."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from m27quant.errors import RecipeError, escape
from m27quant.recipes.imports import exists, library_file, library_label, read_limited, resolve_imports
from m27quant.recipes.recipe import Recipe
from m27quant.recipes.schema import RecipeFile
from m27quant.recipes.strict_model import closest
from m27quant.recipes.strict_yaml import Map, Place, Seq, Value, parse

BUILTIN: Final = (
    "nvfp4_experts_only-fp8_kv",
    "nvfp4_experts_only-fp8_kv_cast",
    "nvfp4_experts_only",
    "nvfp4_experts_only_mse-fp8_kv",
    "nvfp4_experts_only_awmse-fp8_kv",
    "nvfp4_experts_only_gptq-fp8_kv",
)
ALIASES: Final = {
    "nvfp4_experts_only-kv_fp8": "nvfp4_experts_only-fp8_kv",
    "nvfp4_experts_only-kv_fp8_cast": "nvfp4_experts_only-fp8_kv_cast",
}
"""modelopt renamed its recipes in 0.45; both names mean the same here."""

_FOLDER = Path(__file__).parent


def builtin_recipes() -> tuple[Recipe, ...]:
    """Return the recipes that come with m27quant."""
    return tuple(load_recipe(name) for name in BUILTIN)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Return a recipe by built-in name, alias, file, or name in modelopt's collection (`general/ptq/...`).

    Raises:
        RecipeError: nothing goes by that name, or the recipe is not valid (the message says where).
    """
    wanted = str(name_or_path)
    name = ALIASES.get(wanted, wanted)
    if name in BUILTIN:
        return _read(_FOLDER / f"{name}.yaml", label=f"{name}.yaml", name=name, source="builtin")
    path = Path(wanted)
    if wanted and "\0" not in wanted and exists(path):
        library = library_label(path) is not None
        return _read(path, label=wanted, name=path.stem, source=wanted, library=library)
    found = library_file(wanted)
    if found is not None:
        label = library_label(found) or wanted
        return _read(found, label=label, name=found.stem, source=label, library=True)
    near = closest(wanted, [*BUILTIN, *ALIASES])
    raise RecipeError(
        f"no recipe is named `{escape(wanted)}`, and there is no such file",
        hint=f"did you mean `{near}`?" if near else "see `m27quant recipe list`",
    )


def _read(path: Path, *, label: str, name: str, source: str, library: bool = False) -> Recipe:
    return parse_recipe(read_limited(path, label), label=label, name=name, source=source, library=library)


def parse_recipe(data: bytes, *, label: str, name: str, source: str, library: bool = False) -> Recipe:
    """Return the recipe that `data` spells; `label` names it in messages."""
    documents = parse(data, label, library=library)
    if len(documents) != 1 or not isinstance(documents[0], Map):
        raise Place(label, 1).error("a recipe is one YAML mapping with `metadata` and `quantize`")
    tree = resolve_imports(documents[0])
    try:
        file = RecipeFile.model_validate(tree)
    except ValidationError as error:
        raise _error(error.errors(include_url=False)[0], tree, error.error_count()) from None
    _check_coverage(file, tree)
    return Recipe(
        name=name,
        source=source,
        description=" ".join(file.metadata.description.split()),
        quantize=file.quantize,
        calibration=file.calibration,
        places=_rule_places(tree),
    )


def _rule_places(tree: Map) -> tuple[Place, ...]:
    quantize = tree["quantize"]
    entries = quantize["quant_cfg"] if isinstance(quantize, Map) else None
    return tuple(entries.places) if isinstance(entries, Seq) else ()


def _check_coverage(file: RecipeFile, tree: Map) -> None:
    """Refuse a `moe_calib_experts_ratio` that m27quant does not do, or that contradicts `moe_calib`."""
    ratio = file.quantize.algorithm.moe_calib_experts_ratio
    place = _find(tree, ("quantize", "algorithm", "moe_calib_experts_ratio"))
    if ratio is not None and ratio != 1.0:
        raise place.error(
            f"`moe_calib_experts_ratio: {ratio}` is not supported",
            "1.0 calibrates every expert on every token; for routed tokens only leave it out and set "
            "`calibration: {moe_calib: natural}`",
        )
    if ratio == 1.0 and file.calibration.moe_calib == "natural":
        raise place.error("`moe_calib_experts_ratio: 1.0` contradicts `calibration: {moe_calib: natural}`")


def _find(tree: Map, location: tuple[int | str, ...]) -> Place:
    """Return the place of the innermost part of `location` that the file has."""
    place = tree.place
    node: Value = tree
    for part in location:
        match node, part:
            case Map(), _ if part in node:
                place, node = node.places[part], node[part]
            case Seq(), int() if part < len(node):
                place, node = node.places[part], node[part]
    return place


def _error(detail: ErrorDetails, tree: Map, count: int) -> RecipeError:
    """Turn pydantic's first complaint into file, line, key and the next step."""
    context = detail.get("ctx") or {}
    location = detail["loc"]
    if detail["type"] == "recipe_unknown_key":
        location = (*location, context["key"])
    shown = ".".join(escape(part, 60) for part in location if part not in ("one", "many"))
    message = detail["msg"]
    if detail["type"] == "missing":
        message = "required, but missing"
    elif not detail["type"].startswith("recipe_"):
        message = message[:1].lower() + message[1:]
        if not isinstance(detail["input"], dict | list | tuple):
            message += f", not `{escape(detail['input'], 60)}`"
    more = f" (and {count - 1} more)" if count > 1 else ""
    hint = context.get("hint")
    return _find(tree, location).error(f"{shown}: {escape(message, 400)}{more}", str(hint) if hint else None)
