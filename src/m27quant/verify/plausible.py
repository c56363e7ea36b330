"""Scales that are numbers like any other, but cannot be this model's: reciprocals, weights or KV of another order.

Shapes: L layers, E experts, P the projections w1, w2, w3.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from m27quant.checkpoint import names
from m27quant.checkpoint.config import M2Config
from m27quant.verify.collect import Findings

MAX_MEDIAN = {"weight_scale_2": 1.0, "input_scale": 100.0}
"""A median above them means weights beyond 2,688, inputs beyond 268,800: more than BF16 training or F16 hold."""
MAX_WEIGHT = 1000.0
"""No trained weight comes near it; below it, a large scale is an outlier among its like."""
KV_RATIO = 64.0
"""Times the median of all layers; M2's layers differ by less than 10."""


def check_reciprocals(table_LEP: npt.NDArray[np.float32], part: str, found: Findings) -> None:
    """compressed-tensors stores 2688/amax where modelopt stores amax/2688; engines multiply by what they are given."""
    known = table_LEP[~np.isnan(table_LEP)]
    if known.size < 3 or (median := float(np.median(known))) <= MAX_MEDIAN[part]:
        return
    name = f"{names.expert(0, 0, 'w1')}.{part}"
    found.add(
        "M27-S018",
        f"the median {part} is {median:.4g}: the largest value would be {2688 * median:.3g} ('{name}' ...)",
        tensor=name, expected=f"at most {MAX_MEDIAN[part]:g}", found=f"{median:.4g}",
    )  # fmt: skip


def check_largest_weight(name: str, code: int, scale: np.float32 | None, found: Findings) -> None:
    """`code` is the largest of the block scales `name`, E4M3; `scale` is their matrix's weight_scale_2."""
    if code >= 0x7F or scale is None or not np.isfinite(scale):
        return  # reported already
    exponent, mantissa = divmod(code, 8)
    block_scale = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    largest = 6 * block_scale * float(scale)
    if largest > MAX_WEIGHT and not found.any("M27-S018"):
        found.add(
            "M27-S021", f"'{name}_2' is {scale:.4g}: with the block scales the largest weight would be {largest:.4g}",
            tensor=f"{name}_2", expected=f"weights below {MAX_WEIGHT:g}", found=f"{largest:.4g}", badness=largest,
        )  # fmt: skip


def check_kv_outliers(scalars: Mapping[str, np.float32], c: M2Config, found: Findings) -> None:
    """Each layer's k_scale and v_scale against the median of all layers."""
    for of_layer in (names.k_scale, names.v_scale):
        scales = {name: scalars[name] for n in range(c.num_hidden_layers) if (name := of_layer(n)) in scalars}
        good = [float(value) for value in scales.values() if np.isfinite(value) and value > 0]
        if len(good) < 3:
            continue
        median = float(np.median(good))
        for name, value in scales.items():
            if not (np.isfinite(value) and value > 0):
                continue  # reported already
            ratio = float(value) / median
            if not 1 / KV_RATIO <= ratio <= KV_RATIO:
                found.add(
                    "M27-S019", f"'{name}' is {value:.4g}, {ratio:.3g} times the median of all layers {median:.4g}",
                    tensor=name, expected=f"about {median:.4g}", found=f"{value:.4g}",
                    badness=abs(float(np.log(ratio))),
                )  # fmt: skip
