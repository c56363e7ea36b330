"""Sources with rows of tokens, and quantizing them in one call."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m27quant import quantize_checkpoint
from tests.checkpoints import (
    Shape,
    from_fp8,
    random_tensors,
    read_tensors,
    stored,
    write_checkpoint,
    write_rows,
)

REPORT = "quantization_report.json"
MODULE = "model.layers.1.block_sparse_moe.experts.2.w2"
"""A matrix that tests look at."""

SHAPES = {
    "gqa1": Shape(num_attention_heads=2, num_key_value_heads=2, num_local_experts=3),
    "gqa2": Shape(
        hidden_size=208,
        intermediate_size=112,
        head_dim=24,
        rotary_dim=10,
        num_local_experts=8,
        num_experts_per_tok=3,
    ),
    "gqa4": Shape(
        hidden_size=272, intermediate_size=304, num_key_value_heads=1, rotary_dim=24, num_local_experts=5
    ),
}
"""No side is a multiple of 128; some FP8 blocks at the edges are 16 wide."""


@dataclass(frozen=True)
class Model:
    """A source on disk, its content, and rows of tokens for it."""

    folder: Path
    raw_config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    rows: list[list[int]]

    def write_rows(self, path: Path) -> Path:
        """Whole at once: ranks in threads write and read the same file."""
        part = path.with_name(f"{path.name}.{threading.get_ident()}")
        part.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in self.rows))
        return part.replace(path)


def random_model(folder: Path, shape: Shape, *, seed: int = 0, rows: int = 7, longest: int = 61) -> Model:
    """A random FP8 checkpoint in `folder`/fp8."""
    tensors = stored(random_tensors(shape, seed))
    source = write_checkpoint(folder / "fp8", shape, tensors=tensors)
    file = write_rows(folder / "all-rows.jsonl", rows=rows, longest=longest, seed=seed)
    ids = [json.loads(line)["input_ids"] for line in file.read_text().splitlines()]
    return Model(source, shape.config(), tensors, ids)


def tiny_model(repository: Path) -> Model:
    """The trained model with some of the text that it was not trained on."""
    from tokenizers import Tokenizer

    folder = repository / "examples/tiny-m27"
    text = (folder / "heldout.txt").read_text()
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text[:12_000]).ids
    rows = [ids[i * 64 : i * 64 + 64 - 5 * (i % 3)] for i in range(8)]
    raw = json.loads((folder / "config.json").read_text())
    return Model(folder, raw, read_tensors(folder), rows)


def named_model(name: str, repository: Path, folder: Path) -> Model:
    """One of SHAPES, or tiny-m27."""
    return tiny_model(repository) if name == "tiny-m27" else random_model(folder, SHAPES[name])


def quantized(model: Model, out: Path, source: Path | None = None, **options: Any) -> Path:
    """OUT after a quantization on the CPU with the model's rows, from its folder or from `source`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = model.write_rows(out.parent / "rows.jsonl")
    chosen: dict[str, Any] = {"dataset": [str(rows)], "num_samples": len(model.rows), "device": "cpu"}
    quantize_checkpoint(str(source or model.folder), out, **chosen | options)
    return out


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, U8 [n]."""
    return tensor.reshape(-1).view(torch.uint8)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every byte; NaN is NaN here."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def report(folder: Path) -> dict[str, Any]:
    """The quantization report of a checkpoint."""
    document: dict[str, Any] = json.loads((folder / REPORT).read_text())
    return document


def weight_of(model: Model, module: str = MODULE) -> torch.Tensor:
    """BF16 values of a matrix in the source."""
    return from_fp8(model.tensors[f"{module}.weight"], model.tensors[f"{module}.weight_scale_inv"])
