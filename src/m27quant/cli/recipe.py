"""`m27quant recipe`: the recipes that there are, what they do, and whether a file is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from m27quant.cli import options
from m27quant.cli.output import Output, grid, pairs

recipe_app = typer.Typer(
    help="List, show and check recipes.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A name from `recipe list`, a YAML file, or a name in modelopt's collection.",
        show_default=False,
    ),
]

KV_CACHE = {
    "fp8": "FP8, calibrated k_scale and v_scale",
    "fp8_cast": "FP8, no scale tensors (engines use 1.0)",
    None: "BF16",
}


@recipe_app.command("list")
def list_recipes(json: options.Json = False, quiet: options.Quiet = False) -> None:
    """List the built-in recipes."""
    from m27quant.recipes import ALIASES, builtin_recipes

    rows = [
        {
            "name": recipe.name,
            "aliases": [alias for alias, name in ALIASES.items() if name == recipe.name],
            "description": recipe.description,
        }
        for recipe in builtin_recipes()
    ]
    columns = {"name": "recipe", "aliases": "also named", "description": "description"}
    Output.open(json=json, quiet=quiet).table(rows, columns=columns, key="recipes")


@recipe_app.command()
def show(
    recipe: Name,
    modelopt: Annotated[
        bool,
        typer.Option(
            "--modelopt", help="Print the recipe as YAML that nvidia-modelopt reads, without imports."
        ),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a recipe quantizes in MiniMax-M2.7, what it leaves, and what it calibrates on."""
    from m27quant.recipes import load_recipe
    from m27quant.recipes.describe import describe

    output = Output.open(json=json, quiet=quiet)
    loaded = load_recipe(recipe)
    document = describe(loaded)
    if modelopt:
        output.result(
            {"modelopt": loaded.modelopt()}, human=loaded.modelopt_yaml(), quiet=loaded.modelopt_yaml()
        )
        return
    _warn(output, document)
    output.result(document, human=_render(document), quiet=document["name"])


@recipe_app.command()
def validate(recipe: Name, json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Check a recipe against MiniMax-M2.7's layout; exit 2 says where it is wrong."""
    from m27quant.recipes import load_recipe
    from m27quant.recipes.describe import describe

    output = Output.open(json=json, quiet=quiet)
    document = describe(load_recipe(recipe))
    _warn(output, document)
    output.result(
        {"valid": True, **document},
        human=f"{document['name']} ({document['source']}): valid",
        quiet=document["name"],
    )


@recipe_app.command()
def schema(json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Print the JSON Schema of a recipe, for editors; imports are resolved before it applies."""
    from json import dumps

    from m27quant.recipes import RecipeFile

    document = RecipeFile.model_json_schema()
    text = dumps(document, indent=2)
    Output.open(json=json, quiet=quiet).result({"json_schema": document}, human=text, quiet=text)


def _warn(output: Output, document: Mapping[str, Any]) -> None:
    for notice in document["notices"]:
        output.warning(notice)


def _render(document: Mapping[str, Any]) -> RenderableType:
    calibration = document["calibration"]
    coverage = {"full": "every expert on every token", "natural": "routed tokens only"}
    facts = {
        "recipe": document["name"],
        "source": document["source"],
        "description": document["description"],
        "KV cache": KV_CACHE[document["kv_cache"]],
        "algorithm": document["algorithm"],
        "optimizes": document["optimizes"],
        "costs": document["costs"],
        "samples": f"{calibration['num_samples']} of {calibration['seq_len']} tokens",
        "expert coverage": f"{calibration['moe_calib']}: {coverage[calibration['moe_calib']]}",
        "fingerprint": document["fingerprint"],
    }
    modules = [tuple(row.values()) for row in (*document["quantized"], *document["unquantized"])]
    data = [
        (d["path"], d["config"] or "", d["splits"], d["field"] or "found in the row", d["weight"])
        for d in calibration["datasets"]
    ]
    return Group(
        pairs(facts),
        Text("\nmodules of MiniMax-M2.7", style="bold"),
        grid(("modules", "count", "become"), modules),
        Text("\ncalibration data", style="bold"),
        grid(("data set", "config", "splits", "column", "weight"), data),
    )
