"""What can be wrong with packed weights, and with what should be the source's: found at level full only.

The folders are quantized from `SHAPE`, whose block scales fill whole tiles of a kernel's layout.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from m27quant.verify.difference import swizzle
from tests.checkpoints import Shape
from tests.faults import corruptions as c
from tests.faults.corruptions import Change

SHAPE = Shape(
    hidden_size=128,
    intermediate_size=128,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rotary_dim=8,
    num_local_experts=4,
    vocab_size=2048,
)
LAYER = "model.layers.1"
EXPERTS = f"{LAYER}.block_sparse_moe.experts"
W2 = f"{EXPERTS}.2.w2"
REPORT = "quantization_report.json"


@dataclass(frozen=True)
class WeightFault:
    """A change, the check that must find it, and the tensor or file that the finding must name."""

    change: Change
    code: str
    names: str
    source: bool = True
    """Only a comparison with the source can see it."""
    report: bool = False
    """Quantization's own report, with its hashes, lies beside the shards."""


def read(folder: Path, name: str) -> bytes:
    header, buffer = c.split_shard(c.shard_of(folder, name))
    begin, end = header[name]["data_offsets"]
    return buffer[begin:end]


def write(folder: Path, name: str, data: bytes) -> None:
    def change(body: bytearray) -> None:
        assert len(body) == len(data)
        assert bytes(body) != data, "nothing changes"
        body[:] = data

    c.edit_tensor(folder, name, change)


def mapped(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """The bytes of a tensor go through `change`."""
    return lambda folder: write(folder, name, change(np.frombuffer(read(folder, name), np.uint8)).tobytes())


def flipped(name: str, at: int, bit: int) -> Change:
    """One bit of a tensor."""

    def change(data: np.ndarray) -> np.ndarray:
        data = data.copy()
        data[at] ^= 1 << bit
        return data

    return mapped(name, change)


def scaled(name: str, factor: float) -> Change:
    def change(folder: Path) -> None:
        (value,) = struct.unpack("<f", read(folder, name))
        write(folder, name, struct.pack("<f", value * factor))

    return change


def reciprocal(folder: Path) -> None:
    """All global scales of the layer, as a converter would leave them."""
    for expert in range(SHAPE.num_local_experts):
        for projection in ("w1", "w2", "w3"):
            name = f"{EXPERTS}.{expert}.{projection}.weight_scale_2"
            (value,) = struct.unpack("<f", read(folder, name))
            write(folder, name, struct.pack("<f", 1 / value))


def exchanged(one: str, other: str) -> Change:
    """What lies under two names of matrices, scales included, changes places."""

    def change(folder: Path) -> None:
        for part in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
            a, b = read(folder, f"{one}.{part}"), read(folder, f"{other}.{part}")
            for name, data in ((one, b), (other, a)):
                if a != b:  # w1 and w3 share scales
                    write(folder, f"{name}.{part}", data)

    return change


def experts_exchanged(folder: Path) -> None:
    for projection in ("w1", "w2", "w3"):
        exchanged(f"{EXPERTS}.2.{projection}", f"{EXPERTS}.3.{projection}")(folder)


def another_expert(folder: Path) -> None:
    for part in ("weight", "weight_scale", "weight_scale_2"):
        write(folder, f"{W2}.{part}", read(folder, f"{EXPERTS}.0.w2.{part}"))


def swizzled(data: np.ndarray) -> np.ndarray:
    scale = torch.from_numpy(data.copy()).view(SHAPE.hidden_size, SHAPE.intermediate_size // 16)
    return swizzle(scale).numpy()


def rounded_down(data: np.ndarray) -> np.ndarray:
    """Every BF16 one step nearer to zero."""
    return data.view("<u2") - np.uint16(1)


def zeroed_blocks(data: np.ndarray) -> np.ndarray:
    data = data.copy()
    data[16:32] = 0
    return data


def noise(data: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, data.size, np.uint8)


def not_a_number(data: np.ndarray) -> np.ndarray:
    numbers = data.copy().view("<u2")
    numbers[7] = 0x7FC0
    return numbers


def less_in_report(folder: Path) -> None:
    c.edit_json(folder / REPORT, lambda report: report["shards"].popitem())


WEIGHTS = {
    "bit flip under the report": WeightFault(
        flipped(f"{W2}.weight", 100, 0), "M27-W001", "safetensors", source=False, report=True
    ),
    "matrix of zeros": WeightFault(
        mapped(f"{W2}.weight", lambda d: d * 0), "M27-W002", f"{W2}.weight", source=False
    ),
    "blocks of zeros": WeightFault(
        mapped(f"{W2}.weight", zeroed_blocks), "M27-W003", f"{W2}.weight", source=False
    ),
    "saturated codes": WeightFault(
        mapped(f"{W2}.weight", lambda d: d | 0x77), "M27-W004", f"{W2}.weight", source=False
    ),
    "embedding with NaN": WeightFault(
        mapped("model.embed_tokens.weight", not_a_number), "M27-W005", "embed_tokens", source=False
    ),
    "shard not in the report": WeightFault(less_in_report, "M27-W006", "safetensors", source=False, report=True),
    "report without shards": WeightFault(c.put(REPORT, b"{}"), "M27-W006", REPORT, source=False, report=True),
    "nibbles swapped": WeightFault(
        mapped(f"{W2}.weight", lambda d: (d << 4) | (d >> 4)), "M27-W010", f"{W2}.weight"
    ),
    "block scales swizzled": WeightFault(
        mapped(f"{W2}.weight_scale", swizzled), "M27-W011", f"{W2}.weight"
    ),
    "global scales reciprocal": WeightFault(reciprocal, "M27-W012", f"{EXPERTS}."),
    "maximum a bit off": WeightFault(scaled(f"{W2}.weight_scale_2", 1.01), "M27-W013", f"{W2}.weight"),
    "matrix of another expert": WeightFault(another_expert, "M27-W014", f"{EXPERTS}.0.w2"),
    "w1 and w3 exchanged": WeightFault(
        exchanged(f"{EXPERTS}.2.w1", f"{EXPERTS}.2.w3"), "M27-W014", f"holds the weights of '{EXPERTS}.2.w"
    ),
    "experts exchanged": WeightFault(experts_exchanged, "M27-W014", f"holds the weights of '{EXPERTS}.3.w"),
    "matrix of another layer": WeightFault(
        exchanged(W2, "model.layers.0.block_sparse_moe.experts.2.w2"),
        "M27-W014", "holds the weights of 'model.layers.0.block_sparse_moe.experts.2.w2'",
    ),
    "bit flip in the codes": WeightFault(flipped(f"{W2}.weight", 1000, 4), "M27-W015", f"{W2}.weight"),
    "bit flip in a block scale": WeightFault(flipped(f"{W2}.weight_scale", 99, 0), "M27-W015", f"{W2}.weight"),
    "noise for weights": WeightFault(mapped(f"{W2}.weight", noise), "M27-W016", f"{W2}.weight"),
    "attention rounded down": WeightFault(
        mapped(f"{LAYER}.self_attn.q_proj.weight", rounded_down), "M27-W018", "self_attn.q_proj.weight"
    ),
    "embedding changed": WeightFault(
        flipped("model.embed_tokens.weight", 77, 0), "M27-W019", "model.embed_tokens.weight"
    ),
    "head changed": WeightFault(flipped("lm_head.weight", 77, 0), "M27-W019", "lm_head.weight"),
    "router changed": WeightFault(
        flipped(f"{LAYER}.block_sparse_moe.gate.weight", 5, 1), "M27-W020", "block_sparse_moe.gate.weight"
    ),
    "router's bias changed": WeightFault(
        flipped(f"{LAYER}.block_sparse_moe.e_score_correction_bias", 0, 0), "M27-W020", "e_score_correction_bias"
    ),
    "norm changed": WeightFault(flipped("model.norm.weight", 0, 0), "M27-W021", "model.norm.weight"),
    "norm of keys changed": WeightFault(
        flipped(f"{LAYER}.self_attn.k_norm.weight", 3, 0), "M27-W021", "self_attn.k_norm.weight"
    ),
}  # fmt: skip
