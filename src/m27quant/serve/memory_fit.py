"""How long a context fits: weights, drafter, activations and cache on the fullest GPU, in bytes.

Weights and cache are `verify`'s arithmetic, so that both say the same of a checkpoint.  The drafter is counted whole on
every GPU, though engines cut most of it; activations are an estimate of the engines' largest step.
"""

from __future__ import annotations

from dataclasses import dataclass

from m27quant.checkpoint.config import M2Config
from m27quant.verify.engines_data import Gpu
from m27quant.verify.serving import Memory

GIB = 2**30
LARGE_STEP, STEP, SMALL_STEP = 16_384, 8_192, 2_048
"""Tokens of the largest step that engines choose: GPUs of 160 GiB and more, others, GB10."""
LARGE_GPU = 160 * GIB
GRAPHS = GIB
"""CUDA graphs, workspaces of kernels and NCCL's buffers."""
ROUND = 256
LEAST_CONTEXT = 8_192
"""Where memory allows less, more GPUs are asked for, unless a shorter context was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterSize:
    """What a drafter takes of every GPU."""

    weights: int
    cache_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Bytes of one GPU, and the tokens that they leave room for."""

    memory: int
    share: float
    weights: int
    drafter: int
    steps: int
    """Activations of the largest step, where the engine's share includes them."""
    cache_per_token: int
    """The drafter's included."""
    limit: int
    """The model's own, in tokens."""
    wanted: int | None

    @property
    def usable(self) -> int:
        """The engine's share of the memory."""
        return int(self.memory * self.share)

    @property
    def tokens(self) -> int:
        """Tokens of cache, of all requests together."""
        return max(0, (self.usable - self.weights - self.drafter - self.steps) // self.cache_per_token)

    @property
    def context(self) -> int:
        """Tokens of one request: what was asked for, else the model's limit or what fits."""
        if self.wanted is not None:
            return self.wanted
        return self.limit if self.tokens >= self.limit else self.tokens // ROUND * ROUND

    @property
    def fits(self) -> bool:
        """Whether the context that was asked for fits, or one of a useful length."""
        return self.tokens >= (self.wanted or min(self.limit, LEAST_CONTEXT))

    def describe(self) -> str:
        """The sum, in words."""
        parts = [f"weights {gib(self.weights)}"]
        parts += [f"drafter {gib(self.drafter)}"] if self.drafter else []
        parts += [f"steps {gib(self.steps)}"] if self.steps else []
        return (
            f"{' + '.join(parts)} of {gib(self.usable)} ({self.share:.0%} of {gib(self.memory)}) leave room for "
            f"{self.tokens:,} tokens at {self.cache_per_token / 1024:.1f} KiB"
        )


def fit(
    needed: Memory,
    c: M2Config,
    gpu: Gpu,
    *,
    tp: int,
    slices: int,
    share: float,
    steps_inside: bool,
    drafter: DrafterSize | None = None,
    wanted: int | None = None,
) -> Fit:
    """What one GPU holds; `needed` is the target's part, `slices` among how many GPUs one expert is cut."""
    return Fit(
        memory=gpu.memory_bytes,
        share=share,
        weights=needed.weights,
        drafter=drafter.weights if drafter else 0,
        steps=step_bytes(c, gpu, tp, slices) if steps_inside else 0,
        cache_per_token=needed.cache_per_token + (drafter.cache_per_token if drafter else 0),
        limit=c.max_position_embeddings,
        wanted=wanted,
    )


def step_bytes(c: M2Config, gpu: Gpu, tp: int, slices: int) -> int:
    """Activations of the largest step in BF16, its experts' in and out, logits of a thousand answers; an estimate."""
    tokens = SMALL_STEP if gpu.name == "gb10" else LARGE_STEP if gpu.memory_bytes >= LARGE_GPU else STEP
    dense = 4 * c.hidden_size + 2 * (c.q_size + 2 * c.kv_size) // tp
    experts = c.num_experts_per_tok * (2 * c.intermediate_size // slices + c.hidden_size)
    return 2 * tokens * (dense + experts) + 4 * 1024 * c.vocab_size + GRAPHS


def gib(size: int) -> str:
    """As verify writes sizes."""
    return f"{size / GIB:.1f} GiB"
