"""Fields of config.json that decide on the numbers and not on any size, against the source's."""

from __future__ import annotations

from m27quant.checkpoint.config import M2Config
from m27quant.verify.collect import Findings

FIELDS = ("rotary_dim", "rope_theta", "rms_norm_eps", "num_experts_per_tok")
ON_ROTATION = ("M27-F003", "M27-F004", "M27-F026", "M27-F027")


def compare_configs(ours: M2Config, theirs: M2Config, found: Findings) -> None:
    """Report each field that differs; what the tensors' shapes tell is compared elsewhere."""
    if found.any(*ON_ROTATION):
        return  # a value was assumed in the place of one that is missing or contradicted
    for field in FIELDS:
        a, b = getattr(ours, field), getattr(theirs, field)
        if a != b:
            found.add(
                "M27-W024", f"{field} is {a:g} here and {b:g} in the source",
                file="config.json", expected=f"{b:g}", found=f"{a:g}",
            )  # fmt: skip
