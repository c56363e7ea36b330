"""A checkpoint of several precisions is told to be one, instead of a finding for each of its tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from m27quant import verify_checkpoint
from tests.faults import corruptions as c
from tests.faults.edits import edit_tensors

ATTENTION = re.compile(r".*\.self_attn\.[qkvo]_proj\.weight")


def make_mixed(folder: Path, scale: str) -> None:
    """FP8 attention in blocks, as modelopt's FP8_PB_WO has it, and a list of algorithms."""

    def one(name: str, entry: dict[str, Any], data: bytes) -> list[tuple[str, str, list[int], bytes]]:
        if not ATTENTION.fullmatch(name):
            return [(name, entry["dtype"], entry["shape"], data)]
        rows, columns = entry["shape"]
        grid = [-(-rows // 128), -(-columns // 128)]
        scales = b"\0\0\x80\x3f" * (grid[0] * grid[1])
        fp8 = bytes(rows * columns)
        return [(name, "F8_E4M3", [rows, columns], fp8), (f"{name}{scale}", "F32", grid, scales)]

    edit_tensors(folder, one)
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}}
    c.edit_json(folder / "config.json", lambda d: d["quantization_config"].update(mixed))
    c.edit_json(folder / "hf_quant_config.json", lambda d: d["quantization"].update(mixed))


@pytest.mark.parametrize("scale", ["_scale", "_scale_inv"])
def test_mixed_precision_is_one_finding(folder: Path, scale: str) -> None:
    make_mixed(folder, scale)
    (finding,) = verify_checkpoint(folder).findings
    assert finding.check.code == "M27-F029"
    assert "MIXED_PRECISION" in finding.message


def test_fp8_attention_under_another_label_is_an_error(folder: Path) -> None:
    make_mixed(folder, "_scale")
    c.edit_json(folder / "config.json", lambda d: d["quantization_config"].update(quant_algo="NVFP4"))
    c.edit_json(folder / "hf_quant_config.json", lambda d: d["quantization"].update(quant_algo="NVFP4"))
    assert {"M27-D001", "M27-T009"} <= {f.check.code for f in verify_checkpoint(folder).findings}
