"""Which of m27quant's formats a quantizer's attributes describe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from m27quant.recipes.schema import Attributes

E2M1, E4M3 = (2, 1), (4, 3)
NVFP4_BLOCKS: dict[int | str, Any] = {-1: 16, "type": "dynamic", "scale_bits": E4M3}
NVFP4_STATIC_BLOCKS: dict[int | str, Any] = {**NVFP4_BLOCKS, "type": "static"}
SUPPORTED = (
    "NVFP4 (num_bits [2, 1], dynamic blocks of 16, scale_bits [4, 3]) for weights and inputs "
    "of expert w1, w2 and w3 (static blocks for weights where the algorithm is mse, awmse or gptq), and FP8 (num_bits "
    "[4, 3]) for the KV cache"
)


@dataclass(frozen=True, slots=True)
class Format:
    """`kind` is "other" for what m27quant cannot write; `text` says it in words."""

    kind: Literal["nvfp4", "nvfp4_static", "fp8", "fp8_cast", "other"]
    text: str


NVFP4 = Format("nvfp4", "NVFP4")
NVFP4_STATIC = Format("nvfp4_static", "NVFP4 with static blocks of 16 along axis -1")
FP8 = Format("fp8", "FP8")
FP8_CAST = Format("fp8_cast", "FP8 without scales")
MODELOPT_DEFAULT = Format("other", "modelopt's default INT8, as no entry says anything else")


def format_of(cfg: Attributes | tuple[Attributes, ...]) -> Format:
    """Return the format of an entry's `cfg`; a tuple is modelopt's sequence of quantizers."""
    if isinstance(cfg, tuple):
        return Format("other", "a sequence of quantizers")
    name = _numbers(cfg)
    switches = _switches(cfg)
    blocks = {k: v for k, v in (cfg.block_sizes or {}).items() if v not in (None, False)}
    if cfg.num_bits == E2M1 and blocks == NVFP4_BLOCKS and not cfg.use_constant_amax and not switches:
        return NVFP4
    static = {"type": "static", **blocks} == NVFP4_STATIC_BLOCKS
    if cfg.num_bits == E2M1 and static and not cfg.use_constant_amax and not switches:
        return NVFP4_STATIC
    if cfg.num_bits == E4M3 and not blocks and not switches:
        return FP8_CAST if cfg.use_constant_amax else FP8
    if blocks and blocks != NVFP4_BLOCKS:
        switches.insert(0, f"{blocks.get('type', 'static')} blocks {_blocks(blocks)}")
    if cfg.use_constant_amax:
        switches.append("use_constant_amax")
    return Format("other", f"{name} with {', '.join(switches)}" if switches else name)


def _numbers(cfg: Attributes) -> str:
    match cfg.num_bits:
        case (exponent, mantissa):
            return "NVFP4" if cfg.num_bits == E2M1 and cfg.block_sizes else f"E{exponent}M{mantissa}"
        case int(bits):
            return f"INT{bits}"
        case text:
            return f"`{text}`"


def _blocks(blocks: dict[int | str, Any]) -> str:
    sizes = [f"of {size} along axis {axis}" for axis, size in blocks.items() if isinstance(axis, int)]
    extras = [str(key) for key in blocks if key in ("four_over_six", "scale_block_sizes")]
    scales = [] if blocks.get("scale_bits") == E4M3 else ["without E4M3 scales"]
    return " ".join([*sizes, *scales, *extras])


def _switches(cfg: Attributes) -> list[str]:
    """Everything that changes what is computed and that m27quant does not do."""
    rotated = cfg.rotate if isinstance(cfg.rotate, bool) else cfg.rotate.get("enable") is True
    found = {
        "a dynamic tensor scale (type: dynamic)": cfg.type == "dynamic",
        "constant_amax": cfg.constant_amax is not None,
        "a bias (affine)": cfg.bias is not None,
        "a rotation": rotated,
        "one scale per channel (axis)": cfg.axis is not None,
        "the histogram calibrator": cfg.calibrator != "max",
        "a custom backend": cfg.backend is not None or cfg.backend_extra_args is not None,
        "unsigned values": cfg.unsigned,
        "narrow_range": cfg.narrow_range,
        "fake_quant: false": not cfg.fake_quant,
    }
    return [text for text, is_set in found.items() if is_set]
