"""How a memory budget is kept: what stays in memory, what goes to disk, how many experts are loaded at once."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from m27quant.checkpoint.config import M2Config
from m27quant.errors import EnvironmentFault
from m27quant.kernels.dispatch import choose
from m27quant.runtime.host_memory import give_back_freed, rss_bytes

CHUNK_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens per chunk: part of the computation's identity, as a product's last bit may depend on it."""
MAX_GROUP = 16
"""More experts at once than this save nothing: the chunk's norm is recomputed once per group."""
LATE_CODE = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Code loaded or made during the work: matrix products (see `host_memory.limit_caches`), on a GPU Triton's compiler."""
PER_THREAD = 4 * 2**20
"""A thread's stack, its heap and its scratch for attention and products."""
HEAP_RETENTION = 256 * 2**20
"""What the C library may keep of freed transients before it is told to give them back."""
PLAIN_PACKING = 128 * 2**20
"""What packing in plain torch takes for one strip of a matrix, where there is no compiled core."""
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
    trim_above: int
    """Resident memory, between two experts or chunks, above which freed memory must go back to the system."""

    def trim(self, resident: int) -> None:
        """Give freed memory back where more than planned is resident.

        Blocks of many sizes, small ones that stay among them, let the heap grow with time though no more is in
        use.  Asking the system for each large block instead would cost a fifth of all time in page faults.
        """
        if resident > self.trim_above:
            give_back_freed()


def plan_memory(
    config: M2Config,
    *,
    num_tokens: int,
    longest: int,
    device: torch.device,
    budget: int,
    chunk_tokens: int | None = None,
    beside: tuple[int, int] = (0, 0),
) -> MemoryPlan:
    """Fit calibration of `num_tokens` tokens into `budget` bytes of resident memory.

    On an accelerator the same budget limits its memory too, together with what is free there.
    `chunk_tokens` is set on resume, to the value of the first run; `beside` are bytes that a recipe needs for more:
    in all, and for each expert of a group.

    Raises:
        EnvironmentFault: the smallest arrangement does not fit; says what is needed.
    """
    on_gpu = device.type == "cuda"
    room = min(budget, int(torch.cuda.mem_get_info(device)[0] * 0.92)) if on_gpu else budget
    base = rss_bytes() + LATE_CODE[device.type] + PER_THREAD * torch.get_num_threads()
    always, per_expert = beside
    chunk = chunk_tokens or min(CHUNK_TOKENS[device.type], max(num_tokens, 1))
    while True:
        tokens = max(chunk, longest)
        fixed = always + _routing_bytes(config, num_tokens, chunk) + (0 if on_gpu else base)
        host = base + always + _host_bytes(config, tokens) if on_gpu else 0
        least = fixed + per_expert + _layer_bytes(config, tokens, 1, device)
        if (least <= room and host <= budget) or chunk_tokens or chunk <= longest or chunk <= 256:
            break
        chunk //= 2
    if least > room or host > budget:
        raise EnvironmentFault(
            f"--max-memory {budget / 2**30:.2f} GiB is too little: this model with these data needs "
            f"{math.ceil(max(least, host) / 2**30 * 10) / 10} GiB",
            hint="raise --max-memory, or use shorter sequences (--seq-len)",
        )
    most = min(MAX_GROUP, config.num_local_experts)
    rows = 2 * num_tokens * config.hidden_size * 2
    few = min(4, most)
    in_memory = fixed + rows + few * per_expert + _layer_bytes(config, tokens, few, device) <= room
    fixed += rows if in_memory else 0
    layer = [_layer_bytes(config, tokens, n, device) + n * per_expert for n in range(1, most + 1)]
    group = max([g for g, needed in enumerate(layer, start=1) if fixed + needed <= room], default=1)
    used = fixed + layer[group - 1]
    peak = host if on_gpu else used
    passing = 3 * tokens * config.hidden_size * 2 if on_gpu else tokens * _transient_bytes_per_token(config)
    return MemoryPlan(chunk, in_memory, group, peak, used if on_gpu else 0, peak - passing)


def _layer_bytes(c: M2Config, tokens: int, group: int, device: torch.device) -> int:
    """Peak of one layer beside the rows, with chunks of `tokens` tokens and `group` experts at once.

    The attention and the experts take turns.  Freed transients are partly kept by the allocator.
    """
    attention_weights = 2 * c.hidden_size * (2 * c.q_size + 2 * c.kv_size)
    attention = tokens * _attention_bytes_per_token(c)
    expert = 3 * c.hidden_size * c.intermediate_size
    stored = expert * (1 if c.weight_block_size else 2)
    # packing one expert while the next is read and the last is written, or calibrating with the next one read
    plain = choose("nvfp4_pack", device).backend == "reference"
    packing = stored + 2 * expert + (PLAIN_PACKING if plain else 0)
    experts = group * 2 * expert + stored + max(packing, tokens * _expert_bytes_per_token(c))
    retention = min(HEAP_RETENTION, 3 * tokens * _transient_bytes_per_token(c))
    return max(attention_weights + attention, experts) + retention + PIECE_BYTES


def _transient_bytes_per_token(c: M2Config) -> int:
    """What comes and goes within one chunk of the attention, or one expert."""
    return max(_attention_bytes_per_token(c), _expert_bytes_per_token(c))


def _attention_bytes_per_token(c: M2Config) -> int:
    """At the attention core: x, h and three of theirs; q, rotated q, wide k and v, output twice; narrow k and v.

    The norm of q, in F32, and the router need less.
    """
    return 2 * (6 * c.q_size + 4 * c.kv_size + 3 * c.hidden_size) + 4 * 4 * c.num_local_experts


def _expert_bytes_per_token(c: M2Config) -> int:
    """An expert that all tokens are routed to: h, y, the activation and its routed rows, three times F32 [D]."""
    return c.hidden_size * (2 * 2 + 3 * 4) + c.intermediate_size * 2 * 2


def _routing_bytes(c: M2Config, num_tokens: int, chunk: int) -> int:
    """Row and weight per assignment; bounds per chunk and expert."""
    return num_tokens * c.num_experts_per_tok * 12 + (num_tokens // chunk + 1) * (c.num_local_experts + 1) * 8


def _host_bytes(c: M2Config, tokens: int) -> int:
    """Resident memory beside the accelerator's: experts as read and as packed, chunks on their way to a file."""
    expert = 3 * c.hidden_size * c.intermediate_size
    return 3 * expert * (1 if c.weight_block_size else 2) + 3 * tokens * c.hidden_size * 2 + 3 * PIECE_BYTES


def threads() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
