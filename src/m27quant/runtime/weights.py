"""A whole checkpoint into memory, tensor by tensor, straight into the form in which it is computed with.

One tensor is in memory twice at a time at most: peak memory is that of the packed weights and a little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from m27quant.checkpoint import names
from m27quant.checkpoint.quantized import QuantizedSource
from m27quant.checkpoint.source import Source
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.kernels import chip
from m27quant.kernels.nvfp4_moe import ExpertWeights
from m27quant.kernels.nvfp4_pack import PackedNVFP4
from m27quant.runtime.experts import Experts, PackedExperts, PlainExperts
from m27quant.runtime.host_memory import give_back_freed
from m27quant.runtime.loader import (
    attention_weights,
    dequantize_linear,
    read_plain,
    read_scalar,
    refuse_non_finite,
    router_weights,
)
from m27quant.runtime.model import LayerWeights, Model
from m27quant.runtime.options import Activations, KvCacheDtype
from m27quant.runtime.parallel import ALONE, Ranks

_ITEM_BYTES = {"BF16": 2, "F32": 4, "F16": 2, "F8_E4M3": 1, "U8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """In what form a checkpoint is computed with; nothing of it is "auto" any more."""

    activations: Literal["nvfp4", "bf16"]
    """Of the experts' inputs: nvfp4 is W4A4; bf16 is W4A16, or plain experts of an FP8 or BF16 checkpoint."""
    kv_dtype: torch.dtype
    dtype: torch.dtype
    """Of hidden states and plain weights."""
    device: torch.device
    notices: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line."""
        names = {torch.float8_e4m3fn: "FP8 E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
        products = {"nvfp4": "NVFP4 activations (W4A4)", "bf16": f"{names[self.dtype]} activations"}
        return (
            f"experts with {products[self.activations]}, KV cache in {names[self.kv_dtype]}, on {self.device}"
        )


def choose_form(
    source: Source,
    *,
    activations: Activations,
    kv_cache_dtype: KvCacheDtype,
    dtype: torch.dtype,
    device: torch.device,
) -> Form:
    """Decide what "auto" leaves open.

    W4A4 where the chip has FP4 tensor cores and the checkpoint input scales; an FP8 cache where config.json asks
    for one, else one in `dtype`.

    Raises:
        UsageError: NVFP4 activations for a checkpoint that has no NVFP4 weights or no input scales.
    """
    packed = isinstance(source, QuantizedSource)
    scaled = isinstance(source, QuantizedSource) and source.has_input_scales
    declared = isinstance(source, QuantizedSource) and source.declares_fp8_kv
    if activations == "auto":
        fp4 = device.type == "cuda" and chip.of(device).fp4
        activations = "nvfp4" if scaled and fp4 else "bf16"
    if activations == "nvfp4" and not scaled:
        lacks = "input scales" if packed else "NVFP4 weights"
        raise UsageError(f"NVFP4 activations need a checkpoint with {lacks}", hint="take --activations bf16")
    if kv_cache_dtype == "auto":
        kv_dtype = torch.float8_e4m3fn if declared else dtype
    else:
        kv_dtype = torch.float8_e4m3fn if kv_cache_dtype == "fp8" else torch.bfloat16
    notices = []
    if kv_dtype == torch.float8_e4m3fn and names.k_scale(0) not in source.tensors:
        notices.append("the checkpoint has no k_scale and v_scale: the FP8 cache uses 1.0")
    return Form(
        activations=activations, kv_dtype=kv_dtype, dtype=dtype, device=device, notices=tuple(notices)
    )


def weight_bytes(source: Source, form: Form, max_length: int, ranks: Ranks = ALONE) -> int:
    """Bytes that the weights and the rotary table will take in one rank's memory."""
    total = 2 * max_length * source.config.rotary_dim * form.dtype.itemsize
    for name, info in source.tensors.items():
        elements = info.nbytes // _ITEM_BYTES.get(info.dtype, 1)
        if ".experts." in name and isinstance(source, QuantizedSource):
            total += info.nbytes // ranks.size
        elif ".experts." in name or "_proj.weight" in name:
            total += 0 if name.endswith("_scale_inv") else elements * form.dtype.itemsize // ranks.size
        elif name.endswith("_scale_inv"):
            continue
        elif ".gate." in name or name.endswith("_bias"):
            total += elements * 4
        else:
            total += elements * form.dtype.itemsize
    return total


def load_model(
    source: Source,
    form: Form,
    *,
    max_length: int,
    invariant: bool,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Model:
    """Read every tensor of a checkpoint whose layout has been checked.

    Args:
        source: the checkpoint.
        form: see `choose_form`.
        max_length: tokens of the longest sequence.
        invariant: see `Model`.
        ranks: of several the heads and experts of this one are loaded.
        progress: called with layers done and layers in all.

    Raises:
        CheckpointError: NaN or Inf, a scale that cannot be, a tensor that is missing; names it.
    """
    layers = []
    total = source.config.num_hidden_layers
    for index in range(total):
        layers.append(_layer(source, index, form, ranks))
        give_back_freed()
        progress(index + 1, total)

    def plain(name: str) -> torch.Tensor:
        return read_plain(source, name).to(form.device, form.dtype)

    model = Model(
        source.config,
        embedding_VD=plain(names.EMBEDDING),
        layers=layers,
        norm_D=plain(names.FINAL_NORM),
        head_VD=plain(names.LM_HEAD),
        max_length=max_length,
        invariant=invariant,
        ranks=ranks,
    )
    give_back_freed()
    return model


def _layer(source: Source, index: int, form: Form, ranks: Ranks) -> LayerWeights:
    experts: Experts
    mine = range(source.config.num_local_experts)[ranks.part(source.config.num_local_experts)]
    if isinstance(source, QuantizedSource):
        experts = _packed_experts(source, index, form, mine)
    else:
        experts = _plain_experts(source, index, form, mine)
    k_scale, v_scale = (
        _kv_scale(source, name, form) for name in (names.k_scale(index), names.v_scale(index))
    )
    return LayerWeights(
        attention=ranks.attention(attention_weights(source, index, form.device, form.dtype)),
        router=router_weights(source, index, form.device, form.dtype),
        experts=experts,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _packed_experts(source: Source, layer: int, form: Form, mine: range) -> PackedExperts:
    c = source.config
    weights = ExpertWeights.empty(
        c.num_local_experts, c.hidden_size, c.intermediate_size, activations=form.activations, device=form.device,
        first=mine.start, count=len(mine),
    )  # fmt: skip
    for expert in mine:
        modules = [names.expert(layer, expert, p) for p in names.EXPERT_PROJECTIONS]
        w1, w2, w3 = (_read_packed(source, module) for module in modules)
        scale_13 = scale_2 = None
        if form.activations == "nvfp4":
            s1, scale_2, s3 = (read_scalar(source, f"{module}.input_scale") for module in modules)
            scale_13 = torch.maximum(s1, s3)  # engines keep one for both, the larger
        try:
            weights.set(expert, w1, w2, w3, scale_13, scale_2)
        except CheckpointError as fault:
            raise CheckpointError(f"layer {layer}, {fault.message}", hint=fault.hint) from None
    return PackedExperts(weights)


def _read_packed(source: Source, module: str) -> PackedNVFP4:
    return PackedNVFP4(
        source.read(f"{module}.weight"),
        source.read(f"{module}.weight_scale"),
        read_scalar(source, f"{module}.weight_scale_2"),
    )


def _plain_experts(source: Source, layer: int, form: Form, mine: range) -> PlainExperts:
    matrices = []
    for expert in mine:
        w1, w2, w3 = (
            dequantize_linear(source, names.expert(layer, expert, p), form.device, form.dtype)
            for p in names.EXPERT_PROJECTIONS
        )
        matrices.append((w1, w2, w3))
    return PlainExperts(matrices, mine.start, source.config.num_local_experts)


def _kv_scale(source: Source, name: str, form: Form) -> torch.Tensor:
    if form.kv_dtype != torch.float8_e4m3fn or name not in source.tensors:
        return torch.ones((), device=form.device)
    scale = read_scalar(source, name)
    refuse_non_finite(name, scale)
    if not float(scale) > 0:
        raise CheckpointError(f"tensor '{escape(name)}' is {float(scale)}: a scale is positive")
    return scale.to(form.device)
