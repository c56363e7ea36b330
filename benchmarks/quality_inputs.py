"""Weights and what they are multiplied with: of tiny-m27, and of M2.7's width made up.

The error of outputs is measured on inputs that no method has seen.

Shapes: N out features, K in features, T tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from m27quant.checkpoint import names
from m27quant.checkpoint.hub import locate
from m27quant.checkpoint.source import Source
from m27quant.kernels import fp8_dequant
from m27quant.runtime import layer as M
from m27quant.runtime import loader
from tests.kernels.scale_cases import DISTRIBUTIONS, as_fp8

TINY = Path(__file__).parents[1] / "examples/tiny-m27"
CPU = torch.device("cpu")
WINDOW, MOST_TOKENS = 256, 24_576
WIDE = (1536, 3072)
"""An expert's w1 of M2.7."""


class Sample(NamedTuple):
    """A matrix and its inputs."""

    weight: Tensor
    """FP8 or BF16 [N, K]."""
    scale: Tensor | None
    """Block scales of FP8."""
    seen: Tensor
    """F32 [T, K]: inputs to calibrate by."""
    unseen: Tensor
    """F32 [T, K]: others, to measure by."""

    @property
    def x(self) -> Tensor:
        """BF16 values [N, K]."""
        if self.scale is None:
            return self.weight
        return fp8_dequant.dequantize(self.weight, self.scale)


def tiny() -> Sample:
    """All w1 of the first layer below each other; the MoE's inputs on calibration text and on held-out text."""
    rows = [json.loads(row) for row in (TINY / "calibration.jsonl").read_text().splitlines()]
    texts = ["\n".join(row["text"] for row in rows if "text" in row), (TINY / "heldout.txt").read_text()]
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    with Source(locate(str(TINY))) as source:
        weights = [
            loader.dequantize_linear(source, names.expert(0, expert, "w1"), CPU)
            for expert in range(source.config.num_local_experts)
        ]
        seen, unseen = (_moe_inputs(source, tokenizer.encode(text).ids[:MOST_TOKENS]) for text in texts)
    return Sample(torch.cat(weights), None, seen, unseen)


def _moe_inputs(source: Source, ids: list[int]) -> Tensor:
    config, embedding = source.config, loader.read_plain(source, names.EMBEDDING).to(torch.bfloat16)
    attention, router = loader.attention_weights(source, 0, CPU), loader.router_weights(source, 0, CPU)
    inputs = []
    for window in torch.tensor(ids).split(WINDOW):
        rotary = M.rotary_table(torch.arange(len(window)), config, torch.bfloat16)
        x = M.attention_block(embedding[window], attention, config, rotary, M.causal_attention)
        inputs.append(M.moe_input(x, router, config).float())
    return torch.cat(inputs)


def wide(kind: str, rows: int, tokens: int = 6144) -> Sample:
    """Rows of a matrix of M2.7's width, FP8; inputs of falling spectrum, channels spread by a factor e either way."""
    K = WIDE[1]
    g = torch.Generator().manual_seed(0)
    weight, scale = as_fp8(DISTRIBUTIONS[kind](g, rows, K))
    spectrum = torch.arange(1, K + 1) ** -0.5
    directions = torch.randn(K, K, generator=g) * torch.randn(K, generator=g).exp()
    seen, unseen = (
        torch.randn(count, K, generator=g) * spectrum @ directions for count in (tokens, tokens // 4)
    )
    return Sample(weight, scale, seen, unseen)
