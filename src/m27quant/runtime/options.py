"""How to run a model; the command's options have the same names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from m27quant.errors import UsageError

Activations = Literal["auto", "nvfp4", "bf16"]
KvCacheDtype = Literal["auto", "fp8", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Everything but the checkpoint and the drafter."""

    activations: Activations = "auto"
    """Of the experts' inputs: nvfp4 (W4A4) or bf16 (W4A16); auto: nvfp4 on chips with FP4 tensor cores."""
    kv_cache_dtype: KvCacheDtype = "auto"
    """auto: what config.json asks for, else the hidden states' dtype."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of hidden states and of weights that are not packed."""
    device: str = "auto"
    invariant: bool | None = None
    """Outputs depend on nothing that runs beside them, bit for bit; None: on a CPU."""
    max_memory: int | None = None
    """Bytes to stay within; None: most of what is free."""
    kv_cache_memory: int | None = None
    """Bytes of the cache; None: what is left, on a CPU at most 4 GiB."""
    max_model_len: int | None = None
    """Tokens of the longest sequence; None: the model's limit, or as many as the cache holds."""
    max_num_seqs: int = 64
    """Sequences that run at the same time; others wait."""
    max_num_batched_tokens: int = 2048
    """Tokens of a step; longer prompts are computed in pieces."""
    block_size: int = 16
    """Tokens of a block of the cache."""
    prefix_caching: bool = True
    """Reuse what the cache has of a prompt's beginning."""
    cuda_graphs: bool = True
    """On a GPU, decoding steps are captured once and replayed."""
    seed: int = 0
    """What requests without a seed derive theirs from."""

    def __post_init__(self) -> None:
        """Raise `UsageError` naming the field that cannot be."""
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_memory", "kv_cache_memory",
                     "max_model_len"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be an integer of at least 1, got {value!r}")
        for name, allowed in (
            ("activations", ("auto", "nvfp4", "bf16")),
            ("kv_cache_dtype", ("auto", "fp8", "bf16")),
            ("dtype", ("bfloat16", "float32")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
