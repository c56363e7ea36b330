"""nvidia-modelopt 0.47 run on MiniMax-M2 with one `nn.Linear` per expert matrix: the oracle of quantization.

The model is transformers' own, attention, norms, rotation, router and order of additions included; only its fused
experts are taken apart into modules with the official names, because with fused ones modelopt shares one input
range among all experts and forces none of them (its `moe_calib_experts_ratio` is then ignored).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.minimax_m2 import modeling_minimax_m2 as hf
from transformers.models.minimax_m2.configuration_minimax_m2 import MiniMaxM2Config

from tests.checkpoints import from_fp8

ROUTER = ("block_sparse_moe.gate.weight", "e_score_correction_bias")


class Expert(nn.Module):
    """w2(silu(w1 x) * (w3 x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class PerExpertSparseMoeBlock(nn.Module):
    """transformers' block with its experts as modules; steps and roundings are those of `MiniMaxM2Experts`."""

    def __init__(self, config: MiniMaxM2Config) -> None:
        super().__init__()
        self.gate = hf.MiniMaxM2TopKRouter(config)
        self.experts = nn.ModuleList(
            Expert(config.hidden_size, config.intermediate_size) for _ in range(config.num_local_experts)
        )
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_local_experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, chosen = self.gate(x, self.e_score_correction_bias)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            position, token = torch.where((chosen == index).T)
            if len(token):
                out = expert(x[token]) * weights[token, position, None]
                y.index_add_(0, token, out.to(y.dtype))
        return y.reshape(hidden_states.shape)


class OfficialNamesLayer(hf.MiniMaxM2DecoderLayer):
    """transformers' layer with its MoE under the official name."""

    def __init__(self, config: MiniMaxM2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self._modules["mlp"]
        self.block_sparse_moe = PerExpertSparseMoeBlock(config)

    @property
    def mlp(self) -> nn.Module:
        return self.block_sparse_moe


class OfficialNamesModel(hf.MiniMaxM2ForCausalLM):
    """transformers' MiniMax-M2 with the official tensor names in memory."""

    def __init__(self, config: MiniMaxM2Config) -> None:
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.model.layers = nn.ModuleList(OfficialNamesLayer(config, i) for i in layers)


def bf16_copy(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with the block-scaled FP8 ones dequantized to BF16; the router stays F32."""
    plain = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(name + "_scale_inv")
        plain[name] = tensor if scale is None else from_fp8(tensor, scale)
    return plain


def hf_config(raw: Mapping[str, Any]) -> MiniMaxM2Config:
    """transformers' configuration of a checkpoint's config.json, without its FP8 section."""
    return MiniMaxM2Config(**{k: v for k, v in raw.items() if k not in ("quantization_config", "auto_map")})


def build(raw_config: Mapping[str, Any], stored: Mapping[str, torch.Tensor]) -> OfficialNamesModel:
    """The model in BF16 with an F32 router, from a checkpoint's tensors (FP8 or BF16)."""
    model = OfficialNamesModel(hf_config(raw_config)).eval()
    model.load_state_dict(bf16_copy(stored), strict=True, assign=True)
    kept = [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.dtype == torch.float32]
    assert all(n.endswith((*ROUTER, "inv_freq")) for n in kept), kept
    return model


@dataclass(frozen=True)
class Batch:
    """input_ids int64 [B, T], and attention_mask [B, T] where rows are padded."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None


def unpadded(rows: Iterable[Sequence[int]]) -> list[Batch]:
    """Each row as a batch of its own."""
    return [Batch(torch.tensor([list(row)])) for row in rows]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> list[Batch]:
    """All rows as one batch, padded on the left as modelopt's data loader does."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return [Batch(ids, mask)]


def quantize(model: OfficialNamesModel, section: Mapping[str, Any], batches: Sequence[Batch]) -> nn.Module:
    """`mtq.quantize` with a recipe's `quantize` section."""
    import modelopt.torch.quantization as mtq

    def forward(m: nn.Module) -> None:
        for batch in batches:
            m(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    with torch.no_grad():
        quantized: nn.Module = mtq.quantize(model, copy.deepcopy(dict(section)), forward_loop=forward)
    for name, module in quantized.named_modules():
        if name.endswith("block_sparse_moe"):  # else modelopt would have forced no expert, silently
            assert hasattr(module, "_moe_calib_experts_ratio"), type(module)
        if name.endswith("self_attn"):
            assert module.k_bmm_quantizer is not None
    return quantized


def export(model: nn.Module, folder: Path) -> Path:
    """`export_hf_checkpoint`: the checkpoint as modelopt writes it."""
    from modelopt.torch.export import export_hf_checkpoint

    model.config.architectures = [
        "MiniMaxM2ForCausalLM"
    ]  # a model made in memory has none; modelopt reads it
    export_hf_checkpoint(model, export_dir=folder)
    return folder
