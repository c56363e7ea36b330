"""Whether the pinned engines know every flag that we pass: reads their wheels as files and imports nothing of them.

    python -m tests.serve.check_flags [WHEEL ...]

Without wheels they are downloaded into a temporary folder (about 400 MB).  What is found, option names and the values
of those that take one of a few, is written to `engine_options.json`, with which the suite compares `engines_data.py`.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m27quant.serve.engines_data import VERSIONS, EngineVersion

FOUND = Path(__file__).with_name("engine_options.json")
SGLANG_FIELDS = re.compile(r"sglang/srt/arg_groups/fields/[a-z_]+\.py")


def trees(wheel: zipfile.ZipFile, *names: str) -> Iterator[ast.Module]:
    for name in names:
        yield ast.parse(wheel.read(name))


def literal(node: ast.AST) -> Any:
    """The value of a constant, or of a list of them; None of anything else."""
    try:
        return ast.literal_eval(node)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return None


def added_options(tree: ast.Module) -> Iterator[str]:
    """Names in calls of `add_argument`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            for argument in node.args:
                if isinstance(name := literal(argument), str) and name.startswith("--"):
                    yield name


def fields_of(tree: ast.Module, *classes: str) -> Iterator[ast.AnnAssign]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and (not classes or node.name in classes):
            yield from (item for item in node.body if isinstance(item, ast.AnnAssign))


def name_of(field: ast.AnnAssign) -> str:
    assert isinstance(field.target, ast.Name)
    return field.target.id


def assigned(tree: ast.Module, name: str) -> ast.AST:
    for node in ast.walk(tree):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if (
            isinstance(node, ast.Assign | ast.AnnAssign)
            and isinstance(target, ast.Name)
            and target.id == name
        ):
            assert node.value is not None
            return node.value
    raise SystemExit(f"{name} is not where it was")


def words(node: ast.AST) -> list[str]:
    """All strings in it: members of a Literal, keys of a table, entries of a list."""
    return sorted(
        {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    )


def keys(node: ast.AST) -> list[str]:
    assert isinstance(node, ast.Dict)
    return sorted(value for key in node.keys if key is not None and isinstance(value := literal(key), str))


# -- the engines -----------------------------------------------------------------------------------


def vllm(wheel: zipfile.ZipFile) -> dict[str, Any]:
    arguments, frontend = trees(wheel, "vllm/engine/arg_utils.py", "vllm/entrypoints/common/cli_args.py")
    kernel, cache, speculative = trees(
        wheel, "vllm/config/kernel.py", "vllm/config/cache.py", "vllm/config/speculative.py"
    )
    backends, tools, reasoning, envs = trees(
        wheel, "vllm/v1/attention/backends/registry.py", "vllm/tool_parsers/__init__.py",
        "vllm/reasoning/__init__.py", "vllm/envs.py",
    )  # fmt: skip
    options = {*added_options(arguments), *added_options(frontend)}
    frontends = fields_of(frontend, "BaseFrontendArgs", "FrontendArgs")
    options |= {"--" + name_of(field).replace("_", "-") for field in frontends}
    members = {
        item.targets[0].id
        for node in ast.walk(backends)
        if isinstance(node, ast.ClassDef) and node.name == "AttentionBackendEnum"
        for item in node.body
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name)
    }
    methods = {
        w
        for n in ("SpeculativeMethod", "EagleModelTypes", "DFlashModelTypes")
        for w in words(assigned(speculative, n))
    }
    return {
        "options": sorted(options),
        "choices": {
            "--moe-backend": words(assigned(kernel, "MoEBackend")),
            "--kv-cache-dtype": words(assigned(cache, "CacheDType")),
            "--attention-backend": sorted(members),
            "--tool-call-parser": keys(assigned(tools, "_TOOL_PARSERS_TO_REGISTER")),
            "--reasoning-parser": keys(assigned(reasoning, "_REASONING_PARSERS_TO_REGISTER")),
            "speculative method": sorted(methods),
        },
        "speculative_config": sorted(map(name_of, fields_of(speculative, "SpeculativeConfig"))),
        "environment": [n for n in keys(assigned(envs, "environment_variables")) if n.startswith("VLLM_")],
        "program": program(wheel, "vllm"),
    }


def sglang(wheel: zipfile.ZipFile) -> dict[str, Any]:
    (server,) = trees(wheel, "sglang/srt/server_args.py")
    lists, tools, reasoning, specs = trees(
        wheel, "sglang/srt/arg_groups/choices.py", "sglang/srt/function_call/function_call_parser.py",
        "sglang/srt/parser/reasoning_parser_names.py", "sglang/srt/speculative/spec_info.py",
    )  # fmt: skip
    options, choices = set(added_options(server)), {}
    for tree in trees(wheel, *filter(SGLANG_FIELDS.fullmatch, wheel.namelist())):
        for field in fields_of(tree):
            for name in _names(field):
                options.add(name)
                if (allowed := _choices(field, lists)) is not None:
                    choices[name] = allowed
    choices["--tool-call-parser"] = keys(assigned(tools, "ToolCallParserEnum"))
    choices["--reasoning-parser"] = words(assigned(reasoning, "REASONING_PARSER_NAMES"))
    choices["--speculative-algorithm"] = sorted(
        item.targets[0].id
        for node in ast.walk(specs)
        if isinstance(node, ast.ClassDef) and node.name == "SpeculativeAlgorithm"
        for item in node.body
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name)
    )
    wanted = {flag.name for flag in VERSIONS["sglang"].flags.values()}
    return {
        "options": sorted(options),
        "choices": {name: choices[name] for name in sorted(choices.keys() & wanted)},
        "program": program(wheel, "sglang"),
    }


def _names(field: ast.AnnAssign) -> list[str]:
    """Options of a field `A[type, "help"]` or `A[type, Arg(...)]`."""
    if not (isinstance(field.annotation, ast.Subscript) and getattr(field.annotation.value, "id", "") == "A"):
        return []
    said = _metadata(field)
    if literal(said["no_cli"]) if "no_cli" in said else False:
        return []
    own = literal(said["cli_name"]) if "cli_name" in said else "--" + name_of(field).replace("_", "-")
    return [own, *(literal(said["aliases"]) if "aliases" in said else [])]


def _metadata(field: ast.AnnAssign) -> dict[str, ast.AST]:
    return {
        keyword.arg: keyword.value
        for node in ast.walk(field.annotation)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Arg"
        for keyword in node.keywords
        if keyword.arg is not None
    }


def _choices(field: ast.AnnAssign, lists: ast.Module) -> list[str] | None:
    node = _metadata(field).get("choices")
    if isinstance(node, ast.Name):
        node = assigned(lists, node.id)
    return words(node) if isinstance(node, ast.List | ast.Tuple) else None


def program(wheel: zipfile.ZipFile, package: str) -> bool:
    """Whether the wheel installs a program of the package's name."""
    points = next(n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    return re.search(rf"^{package}\s*=", wheel.read(points).decode(), re.MULTILINE) is not None


# -- both ------------------------------------------------------------------------------------------


def unknown_flags(engine: EngineVersion, found: dict[str, Any]) -> list[str]:
    """Of what we pass, what the engine does not know."""
    missing = [flag.name for flag in engine.flags.values() if flag.name not in found["options"]]
    for flag in engine.flags.values():
        allowed = found["choices"].get(flag.name)
        if flag.values and allowed is None:
            missing.append(f"{flag.name}: no choices were found")
        missing += [f"{flag.name} {value}" for value in flag.values if value not in (allowed or flag.values)]
    return missing


def main(paths: list[str]) -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, engine in VERSIONS.items():
            given = [p for p in paths if Path(p).name.startswith(f"{name}-{engine.version}-")]
            wheel = Path(given[0]) if given else download(engine, Path(folder))
            with zipfile.ZipFile(wheel) as opened:
                found[name] = {"version": engine.version} | (vllm if name == "vllm" else sglang)(opened)
            missing = unknown_flags(engine, found[name])
            print(f"{wheel.name}: {len(found[name]['options'])} options; unknown to it: {missing or 'none'}")  # noqa: T201
            if missing:
                sys.exit(1)
    FOUND.write_text(json.dumps(found, indent=1) + "\n")


def download(engine: EngineVersion, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, engine.package, "--dest", str(folder)], check=True)
    return next(folder.glob(f"{engine.name}-*.whl"))


if __name__ == "__main__":
    main(sys.argv[1:])
