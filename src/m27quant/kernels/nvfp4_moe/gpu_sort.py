"""Slots sorted by expert, in Triton: two launches, nothing waits for the host, the same order every time.

A slot is one choice of one token, t * K + k.  Each expert's slots, ascending, fill whole blocks of BT places; the
last is filled up with `num_slots`, which stands for none.

In the kernels: b_ a tile, o_ offsets, m_ a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["num_slots", "first"])
def count_kernel(experts, counts, num_slots, first, BS: tl.constexpr):
    """`counts` int32 [C]: the slots of expert first + program."""
    e = tl.program_id(0)
    o_s = tl.arange(0, BS)
    b_count = tl.zeros((BS,), tl.int32)
    for start in range(0, num_slots, BS):
        b_e = tl.load(experts + start + o_s, mask=start + o_s < num_slots, other=-1) - first
        b_count += (b_e == e).to(tl.int32)
    tl.store(counts + e, tl.sum(b_count, axis=0))


@triton.jit(do_not_specialize=["num_slots", "first", "count", "num_blocks"])
def place_kernel(
    experts, counts, slots, block_expert, num_slots, first, count, num_blocks,
    C: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """`slots` int32 [num_blocks * BT], `block_expert` int32 [num_blocks]: from 0 on, -1 for a block that is not used.

    One program for each expert, and one for what is left; C: a power of two, at least `count`.
    """
    e = tl.program_id(0)
    o_c, o_s, o_t = tl.arange(0, C), tl.arange(0, BS), tl.arange(0, BT)
    b_blocks = (tl.load(counts + o_c, mask=o_c < count, other=0) + BT - 1) // BT
    block = tl.sum(tl.where(o_c < e, b_blocks, 0), axis=0)
    if e == count:
        for start in range(block, num_blocks, BS):
            tl.store(block_expert + start + o_s, -1, mask=start + o_s < num_blocks)
    else:
        own = tl.load(counts + e)
        for i in range(0, (own + BT - 1) // BT):
            tl.store(block_expert + block + i, e)
            o_p = i * BT + o_t
            tl.store(slots + block * BT + o_p, num_slots, mask=o_p >= own)
        placed = 0
        for start in range(0, num_slots, BS):
            b_e = tl.load(experts + start + o_s, mask=start + o_s < num_slots, other=-1) - first
            m_s = b_e == e
            b_rank = tl.cumsum(m_s.to(tl.int32), axis=0) - 1 + placed
            tl.store(slots + block * BT + b_rank, start + o_s, mask=m_s)
            placed += tl.sum(m_s.to(tl.int32), axis=0)


def sort_slots(experts_TK: Tensor, first: int, count: int, BT: int) -> tuple[Tensor, Tensor]:
    """Slots int32 [B * BT] and the experts of the B blocks int32 [B], counted from `first`, -1 where there is none.

    B is the most that any routing needs, so that nothing depends on values.
    """
    num_slots = experts_TK.numel()
    num_blocks = num_slots // BT + min(count, num_slots)
    device = experts_TK.device
    counts = torch.empty(count, dtype=torch.int32, device=device)
    slots = torch.empty(num_blocks * BT, dtype=torch.int32, device=device)
    block_expert = torch.empty(num_blocks, dtype=torch.int32, device=device)
    BS = min(4096, max(128, triton.next_power_of_2(num_slots)))
    count_kernel[(count,)](experts_TK, counts, num_slots, first, BS=BS, **OPTIONS)
    place_kernel[(count + 1,)](
        experts_TK, counts, slots, block_expert, num_slots, first, count, num_blocks,
        C=triton.next_power_of_2(count), BT=BT, BS=BS, **OPTIONS,
    )  # fmt: skip
    return slots, block_expert
