"""What the model takes and how many blocks of cache the rest is enough for; refused before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m27quant.checkpoint.config import M2Config
from m27quant.errors import EnvironmentFault
from m27quant.runtime.host_memory import default_budget, rss_bytes
from m27quant.runtime.kv_cache import CacheShape

DEVICE_SHARE = 0.92
"""Of an accelerator's free memory; kernels are loaded and compiled into the rest."""
DEFAULT_CACHE_BYTES = 4 * 2**30
"""Most of a CPU's cache where nothing was asked for: there it competes with everything else that runs."""
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of one rank."""

    device: torch.device
    budget_bytes: int
    base_bytes: int
    """The process before it loads anything; 0 on an accelerator."""
    weight_bytes: int
    drafter_bytes: int
    step_bytes: int
    """Activations and logits of the largest step."""
    cache_bytes: int
    num_blocks: int
    block_size: int

    def describe(self) -> str:
        """One line of figures."""
        tokens = self.num_blocks * self.block_size
        drafter = f"drafter {_gib(self.drafter_bytes)}, " if self.drafter_bytes else ""
        return (
            f"memory on {self.device}: weights {_gib(self.weight_bytes)}, {drafter}"
            f"KV cache {_gib(self.cache_bytes)} ({tokens:,} tokens), a step at most {_gib(self.step_bytes)}; "
            f"{_gib(self.budget_bytes)} to use"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What there is before anything is loaded."""

    device: torch.device
    budget_bytes: int
    base_bytes: int

    @classmethod
    def of(cls, device: torch.device, max_memory: int | None) -> Budget:
        """Look at the device; `max_memory` bytes where that is given."""
        if device.type == "cuda":
            free = int(torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE)
            return cls(device=device, budget_bytes=min(free, max_memory or free), base_bytes=0)
        return cls(device=device, budget_bytes=max_memory or default_budget(), base_bytes=rss_bytes())

    def plan(
        self,
        shape: CacheShape,
        *,
        weight_bytes: int,
        drafter_bytes: int,
        step_bytes: int,
        most_blocks: int,
        cache_bytes: int | None,
    ) -> MemoryPlan:
        """Give the cache what weights and steps leave.

        Args:
            shape: the cache's.
            weight_bytes: of the model.
            drafter_bytes: of the drafter.
            step_bytes: see `step_bytes`.
            most_blocks: more of them are never used.
            cache_bytes: what the cache is to take; None: what is left, on a CPU at most 4 GiB.

        Raises:
            EnvironmentFault: it does not fit; says what each part takes.
        """
        fixed = self.base_bytes + weight_bytes + drafter_bytes + step_bytes
        left = self.budget_bytes - fixed
        wanted = cache_bytes
        if wanted is None:
            wanted = min(left, DEFAULT_CACHE_BYTES) if self.device.type == "cpu" else left
        blocks = min(most_blocks, max(wanted // shape.block_bytes, 1))
        plan = MemoryPlan(
            device=self.device, budget_bytes=self.budget_bytes, base_bytes=self.base_bytes, weight_bytes=weight_bytes,
            drafter_bytes=drafter_bytes, step_bytes=step_bytes, cache_bytes=blocks * shape.block_bytes,
            num_blocks=blocks, block_size=shape.block_size,
        )  # fmt: skip
        if plan.cache_bytes > left:
            process = f", the process itself {_gib(self.base_bytes)}" if self.base_bytes else ""
            raise EnvironmentFault(
                f"the model does not fit: {_gib(fixed + plan.cache_bytes)} needed; {plan.describe()}{process}",
                hint="allow more memory, a smaller cache or smaller steps, or use more devices",
            )
        return plan


def step_bytes(c: M2Config, *, num_tokens: int, num_logits: int, dtype: torch.dtype) -> int:
    """Activations of a step of `num_tokens` tokens, of which `num_logits` get logits; an upper estimate."""
    wide = 4 * c.hidden_size + 3 * (c.q_size + 2 * c.kv_size)
    experts = c.num_experts_per_tok * (3 * c.intermediate_size + c.hidden_size) + 3 * c.num_local_experts
    return num_tokens * (wide * max(dtype.itemsize, 4) + experts * 4) + num_logits * c.vocab_size * 8


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
