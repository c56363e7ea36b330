"""Experts as the device computes them: against their weights in F64, their calibrated ranges, and the source's.

The experts that most of a text's tokens go to are computed alone, by the kernel that the device would use, on what
they see in the loaded model.

Shapes: N tokens, D hidden, I intermediate, T tokens of the text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.checkpoint import names
from m27quant.checkpoint.source import Source
from m27quant.kernels.nvfp4_pack.reference import E2M1_MAX, E4M3_MAX
from m27quant.kernels.nvfp4_quantize.reference import fake_quantize
from m27quant.runtime.layer import Routing, assignments
from m27quant.runtime.loader import dequantize_linear, read_scalar
from m27quant.runtime.model import Model
from m27quant.runtime.probe import logits_of
from m27quant.verify.collect import Findings

CPU = torch.device("cpu")
MIN_PRODUCT_DB = 35.0
"""Kernel against F64: BF16 results alone give 55 dB; rounding that flips an activation's code costs up to 15."""
MIN_SOURCE_DB = 6.0
"""Against the source: sound experts of tiny-m27 have 10 to 20 dB, a scale that is off by 2 leaves 6 or less."""
MAX_RANGE = 2.0
"""w2's input over its calibrated range, median of a layer's experts: sound layers of tiny-m27 have 0.26 to 0.65."""
MIN_RANGE = 1 / 8
"""The same over the median of all layers: sound layers of tiny-m27 have 0.5 to 1.3 of it."""
MAX_TOKENS = 64
"""Of one expert: more do not tell more."""


@dataclass(frozen=True, slots=True)
class LayerProducts:
    """One layer's experts that were computed."""

    layer: int
    num_experts: int
    kernel_db: float
    """Worst SQNR of the kernel against F64."""
    range_ratio: float | None
    """Median over experts of w2's largest input over its calibrated range; None without input scales."""
    source_db: float | None
    """Worst SQNR against the source; None without one."""


@dataclass(frozen=True, slots=True)
class _Expert:
    """What one expert was given and gave."""

    layer: int
    index: int
    seen: Tensor
    """[N, D]: its tokens' hidden states."""
    gave: Tensor
    """[N, D]: by the kernel."""


def check_products(
    model: Model,
    checkpoint: Source,
    source: Source | None,
    ids: list[int],
    found: Findings,
    *,
    activations: str,
    num_experts: int,
    kernel: str,
    progress: Callable[[int], None] = lambda layer: None,
) -> list[LayerProducts]:
    """Compute `num_experts` experts of every layer on a text's tokens.

    Args:
        model: the checkpoint, loaded.
        checkpoint: the same, to be read from.
        source: the FP8 or BF16 model that it was made from.
        ids: the text.
        found: for what is wrong.
        activations: nvfp4 or bf16, as the model computes.
        num_experts: of each layer, the most used ones.
        kernel: what multiplies, for messages.
        progress: called with each layer that is done.
    """
    seen: list[_Expert] = []

    def observe(layer: int, h_TD: Tensor, routing: Routing) -> None:
        seen.extend(_most_used(model, layer, h_TD, routing, num_experts))

    logits_of(model, ids, observe)
    results = []
    for layer in range(model.config.num_hidden_layers):
        experts = [expert for expert in seen if expert.layer == layer]
        results.append(_check_layer(experts, checkpoint, source, found, activations, kernel))
        progress(layer)
    _check_little_used(results, found)
    return results


def _most_used(model: Model, layer: int, h_TD: Tensor, routing: Routing, count: int) -> list[_Expert]:
    routed = assignments(routing, model.config.num_local_experts)
    by_use = sorted(range(model.config.num_local_experts), key=lambda e: -routed.num_tokens[e])
    experts = []
    for index in by_use[:count]:
        if not routed.num_tokens[index]:
            break
        h_ND = h_TD[routed[index].rows[:MAX_TOKENS]]
        alone = Routing(
            torch.full((len(h_ND), 1), index, device=h_ND.device),
            torch.ones(len(h_ND), 1, device=h_ND.device),
        )
        y_ND = model.layers[layer].experts(h_ND, alone, invariant=model.invariant)
        experts.append(_Expert(layer, index, h_ND.cpu(), y_ND.cpu()))
    return experts


def _check_layer(
    experts: list[_Expert],
    checkpoint: Source,
    source: Source | None,
    found: Findings,
    activations: str,
    kernel: str,
) -> LayerProducts:
    kernel_db, source_db, ratios = [], [], []
    for expert in experts:
        exact_ND, ratio = _exact(expert, checkpoint, activations)
        kernel_db.append(_sqnr_db(exact_ND, expert.gave.double()))
        module = names.expert(expert.layer, expert.index, "w2")
        if not kernel_db[-1] >= MIN_PRODUCT_DB:
            found.add(
                "M27-O001",
                f"layer {expert.layer}, expert {expert.index}: {kernel} differs from its weights",
                tensor=f"{module}.weight", expected=f"at least {MIN_PRODUCT_DB:g} dB", found=f"{kernel_db[-1]:.1f} dB",
                badness=-kernel_db[-1],
            )  # fmt: skip
        if ratio is not None:
            ratios.append(ratio)
        if source is not None:
            source_db.append(_against_source(expert, source, found))
    layer = experts[0].layer
    ratio = statistics.median(ratios) if ratios else None
    if ratio is not None and not ratio <= MAX_RANGE:
        found.add(
            "M27-O002",
            f"layer {layer}: inputs of w2 reach {ratio:.1f} times the range they were calibrated to",
            tensor=f"{names.expert(layer, experts[0].index, 'w2')}.input_scale",
            expected=f"at most {MAX_RANGE:g}", found=f"{ratio:.2f}", badness=ratio,
        )  # fmt: skip
    return LayerProducts(layer, len(experts), min(kernel_db), ratio, min(source_db) if source_db else None)


def _check_little_used(layers: list[LayerProducts], found: Findings) -> None:
    """A layer whose w2 sees far less of its range than the others' do."""
    ratios = {r.layer: r.range_ratio for r in layers if r.range_ratio is not None}
    usual = statistics.median(ratios.values()) if ratios else 0.0
    for layer, ratio in ratios.items():
        if ratio < usual * MIN_RANGE:
            found.add(
                "M27-O014",
                f"layer {layer}: inputs of w2 reach {ratio:.3f} of the range they were calibrated to, other layers' "
                f"{usual:.2f}",
                tensor=f"{names.expert(layer, 0, 'w2')}.input_scale",
                expected=f"at least {usual * MIN_RANGE:.3f}", found=f"{ratio:.4f}", badness=usual - ratio,
            )  # fmt: skip


def _exact(expert: _Expert, checkpoint: Source, activations: str) -> tuple[Tensor, float | None]:
    """The expert's output in F64 from what its stored weights stand for, and how far w2's input goes."""
    w1, w2, w3 = (
        dequantize_linear(
            checkpoint, names.expert(expert.layer, expert.index, p), CPU, torch.float32
        ).double()
        for p in names.EXPERT_PROJECTIONS
    )
    scales = {
        p: read_scalar(checkpoint, name)
        for p in names.EXPERT_PROJECTIONS
        if (name := f"{names.expert(expert.layer, expert.index, p)}.input_scale") in checkpoint.tensors
    }
    h_ND = expert.seen.float()
    if activations == "nvfp4":
        h_ND = fake_quantize(h_ND, torch.maximum(scales["w1"], scales["w3"]))
    act_NI = F.silu(h_ND.double() @ w1.T) * (h_ND.double() @ w3.T)
    largest = float(act_NI.abs().max())
    act_NI = act_NI.to(expert.seen.dtype)
    if activations == "nvfp4":
        act_NI = fake_quantize(act_NI.float(), scales["w2"])
    range_of_w2 = float(scales["w2"]) * E2M1_MAX * E4M3_MAX if "w2" in scales else None
    return act_NI.double() @ w2.T, largest / range_of_w2 if range_of_w2 else None


def _against_source(expert: _Expert, source: Source, found: Findings) -> float:
    """SQNR of what the device computed against the source's expert on the same inputs."""
    w1, w2, w3 = (
        dequantize_linear(source, names.expert(expert.layer, expert.index, p), CPU, torch.float32).double()
        for p in names.EXPERT_PROJECTIONS
    )
    h_ND = expert.seen.double()
    wanted_ND = (F.silu(h_ND @ w1.T) * (h_ND @ w3.T)) @ w2.T
    y_ND = expert.gave.double()
    sqnr_db = _sqnr_db(wanted_ND, y_ND)
    if not sqnr_db >= MIN_SOURCE_DB:
        power = float(wanted_ND.square().sum())
        gain = float((y_ND * wanted_ND).sum()) / power if power else math.nan
        found.add(
            "M27-O003",
            f"layer {expert.layer}, expert {expert.index}: its output is not the source's; "
            f"it is about {gain:.2f} times as large",
            tensor=f"{names.expert(expert.layer, expert.index, 'w2')}.weight_scale_2",
            expected=f"at least {MIN_SOURCE_DB:g} dB", found=f"{sqnr_db:.1f} dB", badness=-sqnr_db,
        )  # fmt: skip
    return sqnr_db


def _sqnr_db(wanted: Tensor, value: Tensor) -> float:
    """NaN where a value is not finite."""
    noise, power = float((wanted - value).square().sum()), float(wanted.square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else -math.inf
