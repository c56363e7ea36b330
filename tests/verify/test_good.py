"""Good checkpoints verify without an error and without a warning, at every level."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

import m27quant
from m27quant import quantize_checkpoint, verify_checkpoint
from m27quant.checkpoint.names import TensorSpec
from m27quant.errors import CheckpointError, UsageError
from m27quant.verify.checks import CHECKS
from m27quant.verify.findings import Severity, VerifyResult
from m27quant.verify.run import Level
from tests.faults.corruptions import edit_json
from tests.verify.conftest import RECIPES, SMALL
from tests.verify.sparse import M27, write_sparse

LEVELS = get_args(Level)


def loud(result: VerifyResult) -> list[str]:
    """What a good checkpoint must not give."""
    return [f.message for f in result.findings if f.severity is not Severity.NOTE]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_small_checkpoints(checkpoints: dict[str, Path], recipe: str, level: Level) -> None:
    result = verify_checkpoint(checkpoints[recipe], level=level)
    assert loud(result) == []
    assert result.ok
    notes = [f.check.code for f in result.findings]
    assert notes == (["M27-S017"] if recipe == "fp8_kv_cast" else [])
    assert result.facts["num_local_experts"] == SMALL.num_local_experts
    assert result.facts["kv_scales"] == (2 * SMALL.num_hidden_layers if recipe == "fp8_kv" else 0)
    assert result.facts["kv_cache"] == ("bf16" if recipe == "bf16_kv" else "fp8")


@pytest.mark.parametrize("recipe", RECIPES)
def test_tiny_m27(repository: Path, tmp_path: Path, recipe: str) -> None:
    tiny = repository / "examples/tiny-m27"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((tiny / "calibration.jsonl").read_text().splitlines(keepends=True)[:12]))
    out = tmp_path / "out"
    quantize_checkpoint(str(tiny), out, recipe=RECIPES[recipe], dataset=str(rows))
    for level in LEVELS:
        result = verify_checkpoint(out, level=level)
        assert loud(result) == []
        assert "M27-F025" in {
            f.check.code for f in result.findings
        }  # its config claims MTP, as the original's


def test_quick_imports_neither_torch_nor_numpy(checkpoints: dict[str, Path]) -> None:
    program = (
        "import sys, m27quant\n"
        f"m27quant.verify_checkpoint({str(checkpoints['fp8_kv'])!r}, level='quick')\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_default_level_imports_no_torch(checkpoints: dict[str, Path]) -> None:
    program = (
        "import sys, m27quant\n"
        f"m27quant.verify_checkpoint({str(checkpoints['fp8_kv'])!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_checks_that_were_run_are_named(checkpoints: dict[str, Path]) -> None:
    quick = verify_checkpoint(checkpoints["fp8_kv"], level="quick").checks_run
    default = verify_checkpoint(checkpoints["fp8_kv"]).checks_run
    families = ("M27-V", "M27-R", "M27-W", "M27-L", "M27-O")  # --gpu, --drafter, --full, --logits, --outputs
    on_request = {code for code in CHECKS if code.startswith(families)} - {
        "M27-W005",
        "M27-W007",
    }  # small tensors are always read
    assert set(default) == set(CHECKS) - on_request
    assert set(quick) < set(default)
    assert "M27-S001" not in quick


def test_every_check_says_what_it_means() -> None:
    for code, check in CHECKS.items():
        assert code == check.code
        assert check.title
        assert check.meaning.endswith(".")
        assert check.mend
        assert set(check.engines) <= {"transformers", "vllm", "sglang"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "thorough"}, "unknown level 'thorough'"),
        ({"engine": "llama.cpp"}, "unknown engine 'llama.cpp'"),
        ({"select": ("M27-X",)}, "unknown check 'M27-X'"),
        ({"ignore": ("",)}, "unknown check ''"),
    ],
)
def test_unknown_options_are_refused(
    checkpoints: dict[str, Path], options: dict[str, str], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        m27quant.verify_checkpoint(checkpoints["fp8_kv"], **options)  # type: ignore[arg-type]  # that is the test


def test_the_original_is_not_a_quantized_checkpoint(repository: Path) -> None:
    with pytest.raises(CheckpointError, match="FP8 original"):
        verify_checkpoint(repository / "examples/tiny-m27", level="quick")


@pytest.mark.parametrize(("key", "value"), [("rotary_dim", 128), ("rope_theta", 10_000), (None, None)])
def test_rotation_of_the_official_sizes(tmp_path: Path, key: str | None, value: int) -> None:
    shape = replace(M27, num_local_experts=1, num_experts_per_tok=1, vocab_size=16)
    folder = write_sparse(tmp_path / "m27", replace(shape, rotary_dim=64))
    edit_json(
        folder / "config.json",
        lambda config: config.update({"rope_theta": 5_000_000} | ({key: value} if key else {})),
    )
    result = verify_checkpoint(folder, level="quick", ignore=("M27-F033",))  # it has no tokenizer
    found = [f for f in result.findings if f.severity is Severity.ERROR]
    assert [f.check.code for f in found] == (["M27-F027"] if key else [])
    assert all(str(key) in f.message for f in found)


NVIDIA = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
    "mtp_transformer_layers": 1, "num_mtp_modules": 3, "use_mtp": True, "output_router_logits": False,
    "partial_rotary_factor": 0.5, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0, "sliding_window": None, "transformers_version": "4.57.1",
}  # fmt: skip
"""What config.json of nvidia/MiniMax-M2.7-NVFP4 has beside the official fields."""


def as_nvidia_stores(spec: TensorSpec) -> TensorSpec:
    """Attention in F32, router in BF16."""
    if ".self_attn." in spec.name and spec.name.endswith("_proj.weight"):
        return replace(spec, dtype="F32")
    router = spec.name.endswith((".gate.weight", ".e_score_correction_bias"))
    return replace(spec, dtype="BF16") if router else spec


def test_what_nvidia_publishes_has_no_error(repository: Path, tmp_path: Path) -> None:
    """Headers and configs as theirs; what is found is true of it, and none of it keeps an engine from serving it."""
    shape = replace(M27, num_local_experts=1, num_experts_per_tok=1)
    folder = write_sparse(tmp_path / "m27", shape, as_nvidia_stores)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(repository / "examples/tiny-m27" / name, folder / name)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    end = json.loads((repository / "examples/tiny-m27/generation_config.json").read_text())["eos_token_id"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    edit_json(folder / "config.json", lambda config: config.update(NVIDIA))
    result = verify_checkpoint(folder, level="quick")
    codes = [(f.severity.value, f.check.code) for f in result.findings]
    assert sorted(set(codes)) == [
        ("note", "M27-D004"), ("note", "M27-F025"),
        ("warning", "M27-D003"), ("warning", "M27-F018"), ("warning", "M27-F020"),
    ]  # fmt: skip
    assert result.ok


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        verify_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no weights"):
        verify_checkpoint(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a folder"):
        verify_checkpoint(tmp_path / "file")
