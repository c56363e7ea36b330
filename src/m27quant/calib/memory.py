"""How a memory budget is kept: what stays in memory, what goes to disk, how many experts are loaded at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from m27quant.checkpoint.config import M2Config
from m27quant.errors import EnvironmentFault

CHUNK_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens per chunk: part of the computation's identity, as a product's last bit may depend on it."""
MAX_GROUP = 16
"""More experts at once than this save nothing: the chunk's norm is recomputed once per group."""
ALLOCATOR_SLACK = 192 * 2**20
"""Freed blocks that the C library keeps, thread stacks, code loaded late."""
CONTROL_GROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
PIECE_BYTES = 32 * 2**20
"""How much of a passed-through tensor is in memory at a time."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a budget allows."""

    chunk_tokens: int
    rows_in_memory: bool
    """Hidden states stay in memory (on the device); else in a scratch file."""
    expert_group: int
    """Experts whose BF16 weights are in memory at once."""
    peak_bytes: int
    """Estimated peak resident memory of the process."""
    device_peak_bytes: int
    """Estimated peak memory on the accelerator; 0 on a CPU."""


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def default_budget() -> int:
    """80% of the memory that is free now, or that the control group allows in all where that is less."""
    room = psutil.virtual_memory().available + rss_bytes()
    return int(min([room, *control_group_limits()]) * 0.8)


def control_group_limits() -> list[int]:
    """Bytes that the control group of a container (version 2, 1) allows; empty without one."""
    limits = []
    for file in CONTROL_GROUP_LIMITS:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" is no limit; nor is version 1's enormous number, which any minimum ignores
            limits.append(int(text))
    return limits


def plan_memory(
    config: M2Config,
    *,
    num_tokens: int,
    longest: int,
    device: torch.device,
    budget: int,
    chunk_tokens: int | None = None,
) -> MemoryPlan:
    """Fit calibration of `num_tokens` tokens into `budget` bytes of resident memory.

    On an accelerator the same budget limits its memory too, together with what is free there.
    `chunk_tokens` is set on resume, to the value of the first run.

    Raises:
        EnvironmentFault: the smallest arrangement does not fit; says what is needed.
    """
    on_gpu = device.type == "cuda"
    room = min(budget, int(torch.cuda.mem_get_info(device)[0] * 0.92)) if on_gpu else budget
    base = rss_bytes() + ALLOCATOR_SLACK
    chunk = chunk_tokens or min(CHUNK_TOKENS[device.type], max(num_tokens, 1))
    while True:
        fixed = (
            (0 if on_gpu else base)
            + _routing_bytes(config, num_tokens)
            + _work_bytes(config, max(chunk, longest))
        )
        expert = _expert_bytes(config)
        if fixed + expert <= room or chunk_tokens or chunk <= longest or chunk <= 256:
            break
        chunk //= 2
    if fixed + expert > room:
        raise EnvironmentFault(
            f"--max-memory {budget / 2**30:.1f} GiB is too little: this model with these data needs "
            f"{(fixed + expert) / 2**30:.1f} GiB",
            hint="raise --max-memory, or use shorter sequences (--seq-len)",
        )
    rows = 2 * num_tokens * config.hidden_size * 2
    in_memory = fixed + min(4, MAX_GROUP) * expert + rows <= room
    left = room - fixed - (rows if in_memory else 0)
    group = max(1, min(MAX_GROUP, config.num_local_experts, left // expert))
    used = fixed + group * expert + (rows if in_memory else 0)
    host = base + 3 * expert + PIECE_BYTES * 3 if on_gpu else used
    return MemoryPlan(chunk, in_memory, group, host, used if on_gpu else 0)


def _expert_bytes(c: M2Config) -> int:
    """One expert: FP8 as read (twice, for the one read ahead), BF16 for the product, packed output, one F32 copy."""
    elements = 3 * c.hidden_size * c.intermediate_size
    return elements * 2 + elements * 2 + elements + 4 * c.hidden_size * c.intermediate_size


def _routing_bytes(c: M2Config, num_tokens: int) -> int:
    return num_tokens * c.num_experts_per_tok * 16 + num_tokens * 16


def _work_bytes(c: M2Config, tokens: int) -> int:
    """Transients of one chunk: the wider of the attention's and the experts'; attention weights in BF16."""
    weights = 2 * c.hidden_size * (2 * c.q_size + 2 * c.kv_size) * 2
    attention = tokens * (c.q_size * (4 * 4 + 2 * 3) + c.hidden_size * (4 * 3 + 2 * 3))
    experts = tokens * (
        c.hidden_size * (4 * 3 + 2 * 4) + c.intermediate_size * 2 * 5 + c.num_local_experts * 4 * 4
    )
    return max(weights + attention, experts) + PIECE_BYTES


def threads() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
