"""What the checks look at: one checkpoint folder, read once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.header import TensorInfo
from m27quant.checkpoint.names import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from m27quant.recipes.algorithm import Method

_ATTENTION = re.compile(
    r"model\.layers\.[0-9]+\.self_attn\.[qkvo]_proj\.(?:weight|weight_scale|weight_scale_inv|input_scale)"
)


@dataclass(slots=True)
class View:
    """A checkpoint as far as it could be read; what is absent was reported by the check that missed it."""

    folder: Path
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    """By name, from the headers; where two shards hold one, the index decides."""
    lost: set[str] = field(default_factory=set)
    """Names that the index promises, in shards that cannot be read or do not hold them: already reported."""
    shard_sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each shard that was read."""
    raw_config: dict[str, Any] = field(default_factory=dict)
    config: M2Config | None = None
    """Its sizes, corrected by the tensors where the two disagree; None where config.json is not usable."""
    section: dict[str, Any] | None = None
    """config.json's quantization_config."""
    hf_quant: dict[str, Any] | None = None
    """hf_quant_config.json's `quantization`."""
    recipe_kv: str | None = None
    """The KV cache that quantization_report.json says was calibrated, where there is one: "fp8", "fp8_cast"."""
    block_scales: Method = "max"
    """How quantization_report.json says that block scales were chosen; without one as if from maxima."""
    recorded_sqnr_db: dict[int, dict[str, dict[int, float]]] = field(default_factory=dict)
    """By layer, projection and expert, what quantization_report.json says, where rounding cannot be repeated."""
    expected: dict[str, TensorSpec] = field(default_factory=dict)
    """What config.json implies, by name."""
    excused: set[str] = field(default_factory=set)
    """Expert tensors by ending (`.weight`, `.input_scale`) that are wrong as a whole: reported once, not each."""
    refused: set[str] = field(default_factory=set)
    """git-lfs pointers and links that leave the folder: reported, and not read."""

    row_pairs: dict[str, npt.NDArray[np.float16]] = field(default_factory=dict)
    """By expert (`model.layers.N.block_sparse_moe.experts.E`), from w3's block scales: see `order.row_pairs`."""

    @property
    def kv_declared(self) -> bool:
        """True where the configs ask for an FP8 cache."""
        if self.section is not None:
            return self.section.get("kv_cache_scheme") is not None
        return bool(self.hf_quant and self.hf_quant.get("kv_cache_quant_algo"))

    @property
    def is_mixed(self) -> bool:
        """True where every module has an algorithm of its own."""
        return (self.section or self.hf_quant or {}).get("quant_algo") == "MIXED_PRECISION"

    def is_fp8_attention(self, name: str) -> bool:
        """Whether a tensor belongs to FP8 attention of such a checkpoint: not judged."""
        return self.is_mixed and _ATTENTION.fullmatch(name) is not None
