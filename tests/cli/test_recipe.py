"""`m27quant recipe`: list, show, validate, schema; what goes where, and the exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from m27quant.cli.app import main
from m27quant.recipes import ALIASES, BUILTIN, load_recipe
from tests.cli.conftest import Run
from tests.recipes.common import EXPERTS, KV, NVFP4, entry, recipe_text, written

Call = Callable[..., tuple[int, str, str]]
LIBRARY = "general/ptq/nvfp4_experts_only-kv_fp8"


@pytest.fixture
def recipe(capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code, stdout and stderr of `m27quant recipe ...`."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        code = main(["recipe", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def document(said: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = said
    assert (code, err) == (0, "")
    result: dict[str, Any] = json.loads(out)
    assert result.pop("schema_version") == 1
    return result


def test_list(recipe: Call) -> None:
    code, out, err = recipe("list")
    assert (code, err) == (0, "")
    assert all(name in out for name in (*BUILTIN, *ALIASES))
    assert recipe("list", "--quiet") == (0, "".join(f"{name}\n" for name in BUILTIN), "")
    rows = document(recipe("list", "--json"))["recipes"]
    assert [row["name"] for row in rows] == list(BUILTIN)
    assert {alias: row["name"] for row in rows for alias in row["aliases"]} == ALIASES


@pytest.mark.parametrize(
    ("name", "cache"),
    [(BUILTIN[0], "calibrated k_scale"), (BUILTIN[1], "no scale tensors"), (BUILTIN[2], "BF16")],
)
def test_show(recipe: Call, name: str, cache: str) -> None:
    code, out, err = recipe("show", name)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert any(line.startswith("KV cache") and cache in line for line in lines)
    expert = "model.layers.*.block_sparse_moe.experts.*.w2"
    assert any(line.split() == [expert, "15872", "NVFP4"] for line in lines)
    assert any(line.split() == ["model.layers.*.block_sparse_moe.gate", "62", "unchanged"] for line in lines)
    assert any(line.split() == ["model.layers.*.self_attn.o_proj", "62", "BF16"] for line in lines)
    assert "1024 of 512 tokens" in out
    assert "abisee/cnn_dailymail" in out
    assert recipe("show", name, "-q") == (0, f"{name}\n", "")


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_show_json_is_the_same_by_alias(recipe: Call, alias: str, name: str) -> None:
    by_name = document(recipe("show", name, "--json"))
    assert document(recipe("show", alias, "--json")) == by_name
    assert by_name["fingerprint"] == load_recipe(name).fingerprint()
    assert sum(row["count"] for row in by_name["quantized"]) == 47_616
    assert by_name["calibration"]["num_samples"] == 1024


def test_show_modelopt_prints_what_modelopt_reads(recipe: Call, tmp_path: Path) -> None:
    code, out, _ = recipe("show", LIBRARY, "--modelopt")
    assert code == 0
    assert yaml.safe_load(out) == load_recipe(LIBRARY).modelopt()
    shown = document(recipe("show", BUILTIN[0], "--modelopt", "--json"))["modelopt"]
    assert shown["metadata"]["recipe_type"] == "ptq"


def test_a_notice_goes_to_stderr(recipe: Call) -> None:
    code, out, err = recipe("show", LIBRARY)
    assert code == 0
    assert err.startswith("warning: the recipe sets no moe_calib_experts_ratio")
    assert "warning" not in out


def test_validate(recipe: Call, tmp_path: Path) -> None:
    good = written(
        tmp_path, recipe_text(*EXPERTS, KV, algorithm="{method: max, moe_calib_experts_ratio: 1.0}")
    )
    assert recipe("validate", good) == (0, f"r ({good}): valid\n", "")
    shown = document(recipe("validate", good, "--json"))
    assert (shown["valid"], shown["kv_cache"], shown["source"]) == (True, "fp8", str(good))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (recipe_text(*EXPERTS, more="calibraton: {}\n"), ":8: calibraton: unknown key", "`calibration`"),
        (recipe_text(*EXPERTS, EXPERTS[0] + "\n    enable: no"), ":9:", ""),
        (
            recipe_text(*EXPERTS, more="calibration:\n  seq_len: 1e3\n"),
            ":9: `1e3` means different things",
            "1.0e-3",
        ),
        (recipe_text(*EXPERTS, more="calibration:\n  seq_len: .nan\n"), ":9: `.nan` is not a finite", ""),
        (recipe_text(*EXPERTS, more="calibration:\n  seq_len: -1\n"), ":9: calibration.seq_len", ""),
        (
            recipe_text(*EXPERTS, entry("*expert.*", NVFP4)),
            ":8: pattern `*expert.*` matches nothing",
            ".experts.",
        ),
        (recipe_text(*EXPERTS, entry("*lm_head*", NVFP4)), ":8: pattern `*lm_head*`: lm_head", "NVFP4"),
        (recipe_text(entry("(a+)+$", NVFP4)), ":6: pattern `(a+)+$` matches nothing", ""),
        ("a: &a [*a]\n", ":1: alias `*a` has no anchor before it", ""),
        ("a: !!python/name:os.system\n", ":1: tag `tag:yaml.org,2002:python/name:os.system`", ""),
    ],
)
def test_validate_says_where_and_exits_2(
    recipe: Call, tmp_path: Path, text: str, message: str, hint: str
) -> None:
    bad = written(tmp_path, text)
    code, out, err = recipe("validate", bad)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {bad}{message}")
    assert hint in err
    assert "Traceback" not in err
    code, out, err = recipe("validate", bad, "--json")
    assert (code, out) == (2, "")
    assert json.loads(err)["error"]["kind"] == "recipe"


def test_an_unknown_name_in_the_installed_program(m27quant: Run) -> None:
    done = m27quant("recipe", "show", "nvfp4_expert_only")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no recipe is named `nvfp4_expert_only`" in done.stderr
    assert "hint: did you mean `nvfp4_experts_only`?" in done.stderr


def test_schema(recipe: Call) -> None:
    code, out, _ = recipe("schema")
    assert code == 0
    assert json.loads(out) == document(recipe("schema", "--json"))["json_schema"]
    assert set(json.loads(out)["properties"]) == {"metadata", "quantize", "calibration"}


def test_help_names_the_commands(recipe: Call) -> None:
    code, out, _ = recipe("--help")
    assert code == 0
    assert all(word in out for word in ("list", "show", "validate", "schema"))
