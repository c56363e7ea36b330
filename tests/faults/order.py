"""Mistakes in an order that show without the source, in a model whose rows and columns differ as trained ones do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from m27quant.verify.difference import swizzle
from tests.checkpoints import Shape, random_tensors
from tests.faults import corruptions as c
from tests.faults.corruptions import Change

SHAPE = Shape(
    hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, rotary_dim=8, num_local_experts=6, vocab_size=2048,
)  # fmt: skip
SPREAD = 0.5
"""Of rows' and columns' sizes, as a logarithm: much, since 256 of them have to be enough."""


def spread(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.exp(SPREAD * torch.randn(count, generator=generator))


def trained(shape: Shape) -> dict[str, torch.Tensor]:
    """Random weights that have what training gives: inputs that matter, and neurons that are large or small."""
    generator = torch.Generator().manual_seed(5)
    tensors = random_tensors(shape)
    for layer in range(shape.num_hidden_layers):
        inputs = spread(shape.hidden_size, generator)
        for expert in range(shape.num_local_experts):
            neurons = spread(shape.intermediate_size, generator)
            of = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            for name, size in (("w1", None), ("w3", neurons)):
                weight = tensors[f"{of}.{name}.weight"]
                weight *= inputs
                if size is not None:
                    weight *= size[:, None]
            tensors[f"{of}.w2.weight"] *= neurons
    return tensors


def swizzled(data: np.ndarray) -> np.ndarray:
    return swizzle(torch.from_numpy(data.copy()).view(256, 16)).numpy().ravel()


def swapped(data: np.ndarray) -> np.ndarray:
    return (data << 4) | (data >> 4)


def change(folder: Path, wanted: Callable[[str], bool], how: Callable[[np.ndarray], np.ndarray]) -> None:
    """The bytes of all such tensors go through `how`."""
    for path in folder.glob("*.safetensors"):
        header, _ = c.split_shard(path)
        for name in header:
            if wanted(name):

                def edit(body: bytearray) -> None:
                    body[:] = how(np.frombuffer(bytes(body), np.uint8)).tobytes()

                c.edit_tensor(folder, name, edit)


@dataclass(frozen=True)
class OrderFault:
    """A change, the check that must suspect it, and what every finding must name."""

    change: Change
    code: str
    names: str
    level: Literal["default", "full"]
    """The cheapest that can see it."""


def _swizzle(which: str = "") -> Change:
    return lambda folder: change(folder, lambda n: n.endswith(".weight_scale") and which in n, swizzled)


def _swap(which: str = "") -> Change:
    return lambda folder: change(
        folder, lambda n: ".experts." in n and n.endswith(".weight") and which in n, swapped
    )


OF_LAYER = "model.layers.1.block_sparse_moe.experts"
ORDERS = {
    "all scales swizzled": OrderFault(_swizzle(), "M27-S020", ".weight_scale", "default"),
    "one matrix's scales swizzled": OrderFault(
        _swizzle(f"{OF_LAYER}.2.w2"), "M27-S020", f"{OF_LAYER}.2.w2.weight_scale", "default"
    ),
    "all nibbles swapped": OrderFault(_swap(), "M27-W008", ".w2.weight", "full"),
    "nibbles of w2 swapped": OrderFault(_swap(".w2."), "M27-W008", ".w2.weight", "full"),
    "nibbles of one w2 swapped": OrderFault(
        _swap(f"{OF_LAYER}.2.w2."), "M27-W008", f"{OF_LAYER}.2.w2.weight", "full"
    ),
    "nibbles of one w1 swapped": OrderFault(
        _swap(f"{OF_LAYER}.4.w1."), "M27-W008", f"{OF_LAYER}.4.w1.weight", "full"
    ),
}
