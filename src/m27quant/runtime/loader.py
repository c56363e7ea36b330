"""Weights of a checkpoint as the layer wants them: BF16 (or F32) tensors on a device, whatever they are stored as."""

from __future__ import annotations

import torch

from m27quant.checkpoint import names
from m27quant.checkpoint.source import Source
from m27quant.errors import CheckpointError, escape
from m27quant.kernels import fp8_dequant, nvfp4_pack
from m27quant.runtime.layer import AttentionWeights, RouterWeights

PIECE_ELEMENTS = 2**20
"""Values that are looked at in one go: torch makes F32 of them to add them."""


def read_plain(source: Source, name: str) -> torch.Tensor:
    """A tensor that is passed through, checked for NaN and Inf."""
    tensor = source.read(name)
    refuse_non_finite(name, tensor)
    return tensor


def refuse_non_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise `CheckpointError` naming the tensor, how many values are NaN or Inf, and where the first one is."""
    pieces = torch.split(tensor.flatten(), PIECE_ELEMENTS)
    if all(torch.isfinite(piece.sum(dtype=torch.float32)) for piece in pieces):
        return  # cheap; only a suspicion is counted
    bad = ~torch.isfinite(tensor.float())
    if count := int(bad.sum()):
        first = tuple(bad.nonzero()[0].tolist())
        raise CheckpointError(
            f"tensor '{escape(name)}' holds {count} NaN or Inf values, the first at {list(first)}",
            hint="the source is damaged; download the shard again",
        )


def read_linear(
    source: Source, module: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, weight_scale_inv) of a linear as stored: FP8 [N, K] with F32 block scales, or else with None."""
    weight = source.read(f"{module}.weight").to(device)
    if weight.dtype != torch.float8_e4m3fn:
        return weight, None
    return weight, source.read(f"{module}.weight_scale_inv").to(device)


def dequantize_linear(
    source: Source, module: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """A linear's weight [N, K]: the BF16 dequantization of an FP8 source, or what NVFP4 stands for, in `dtype`.

    Raises:
        CheckpointError: NaN or Inf in weight or scale, naming the tensor.
    """
    weight, scale = read_linear(source, module, device)
    if weight.dtype == torch.uint8:
        block_scale = source.read(f"{module}.weight_scale").to(device)
        global_scale = read_scalar(source, f"{module}.weight_scale_2").to(device)
        weight = nvfp4_pack.unpack(nvfp4_pack.PackedNVFP4(weight, block_scale, global_scale))
    if scale is not None:
        refuse_non_finite(f"{module}.weight_scale_inv", scale)
        block = source.config.weight_block_size
        assert block is not None
        weight = fp8_dequant.dequantize(weight, scale, block=block)
    refuse_non_finite(f"{module}.weight", weight)
    return weight.to(dtype)


def read_scalar(source: Source, name: str) -> torch.Tensor:
    """A tensor of one number, as F32 []."""
    value = source.read(name)
    if value.numel() != 1:
        raise CheckpointError(f"tensor '{escape(name)}' has shape {list(value.shape)}, expected one number")
    return value.reshape(()).float()


def attention_weights(
    source: Source, layer: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> AttentionWeights:
    """One layer's attention weights and norms in `dtype`."""
    prefix = names.attention(layer)

    def plain(name: str) -> torch.Tensor:
        return read_plain(source, name).to(device, dtype)

    projections = {
        p: dequantize_linear(source, f"{prefix}.{p}", device, dtype) for p in names.ATTENTION_PROJECTIONS
    }
    return AttentionWeights(
        input_layernorm=plain(f"{names.layer_prefix(layer)}.input_layernorm.weight"),
        q_norm=plain(f"{prefix}.q_norm.weight"),
        k_norm=plain(f"{prefix}.k_norm.weight"),
        **projections,
    )


def router_weights(
    source: Source, layer: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> RouterWeights:
    """One layer's router; gate and bias in F32 whatever `dtype` is."""
    norm = f"{names.layer_prefix(layer)}.post_attention_layernorm.weight"
    return RouterWeights(
        post_attention_layernorm=read_plain(source, norm).to(device, dtype),
        gate=read_plain(source, names.gate(layer)).to(device, torch.float32),
        e_score_correction_bias=read_plain(source, names.correction_bias(layer)).to(device, torch.float32),
    )
