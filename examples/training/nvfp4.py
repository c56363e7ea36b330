"""Measure what NVFP4 costs a checkpoint, and write it into the checkpoint's model card.

    python examples/training/nvfp4.py --checkpoint examples/tiny-m27      # about ten minutes on two CPU cores

The checkpoint is quantized as `make demo` does it, and compared with itself by `m27quant verify --logits` on the whole
of its held-out text: in the four ways that engines compute, and once with a fault in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from card import NvFp4Row, put_nvfp4_section
from safetensors.torch import load_file, save_file

from m27quant import quantize_checkpoint, verify_checkpoint
from m27quant.verify.logits import LogitsOptions

RECIPE = "nvfp4_experts_only-fp8_kv"
WINDOW = 256
HALVED = "model.layers.1.block_sparse_moe.experts.2"
NAMES = {"nvfp4": "NVFP4 (W4A4)", "bf16": "not quantized (W4A16)"}


def measure(checkpoint: Path, quantized: Path, activations: str, kv_cache: str, fault: str = "") -> NvFp4Row:
    """One row of the table: all of the held-out text in windows of 256 tokens."""
    options = LogitsOptions(
        text=checkpoint / "heldout.txt",
        num_samples=10**6,
        seq_len=WINDOW,
        activations=activations,  # type: ignore[arg-type]  # a key of NAMES
        kv_cache_dtype=kv_cache,  # type: ignore[arg-type]
    )
    result = verify_checkpoint(quantized, level="quick", source=str(checkpoint), logits=options)
    told: dict[str, Any] = result.facts["logits"]
    row = NvFp4Row(
        inputs=NAMES[activations],
        kv_cache=kv_cache.upper(),
        fault=fault,
        codes=tuple(f.check.code for f in result.findings if f.severity == "error"),
        **{
            f.name: told[f.name]
            for f in dataclasses.fields(NvFp4Row)
            if f.name in told and f.name != "kv_cache"
        },
    )
    print(json.dumps(dataclasses.asdict(row)), flush=True)
    return row


def halve(quantized: Path, folder: Path, expert: str) -> Path:
    """A copy in which all global scales of one expert are half of what they should be."""
    shutil.copytree(quantized, folder)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))[
        "weight_map"
    ]
    for projection in ("w1", "w2", "w3"):
        name = f"{expert}.{projection}.weight_scale_2"
        tensors = load_file(folder / weight_map[name])
        tensors[name] /= 2
        save_file(tensors, folder / weight_map[name], metadata={"format": "pt"})
    return folder


def write_section(checkpoint: Path) -> None:
    """Quantize, measure, and put the section into the card."""
    with tempfile.TemporaryDirectory() as home:
        quantized = Path(home) / "nvfp4"
        quantize_checkpoint(
            str(checkpoint), quantized, recipe=RECIPE, dataset=str(checkpoint / "calibration.jsonl")
        )
        rows = [measure(checkpoint, quantized, a, kv) for a in NAMES for kv in ("fp8", "bf16")]
        halved = halve(quantized, Path(home) / "halved", HALVED)
        rows.append(measure(checkpoint, halved, "nvfp4", "fp8", fault=f"scales of `{HALVED}` halved"))
    card = checkpoint / "README.md"
    card.write_text(put_nvfp4_section(card.read_text(encoding="utf-8"), rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what NVFP4 costs a checkpoint, for its model card.")
    parser.add_argument("--checkpoint", type=Path, default=Path("examples/tiny-m27"))
    write_section(parser.parse_args().checkpoint)


if __name__ == "__main__":
    main()
