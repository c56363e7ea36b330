"""One model over several ranks: each has some attention heads and some experts, all have the residual stream.

Every rank of `torchrun --nproc-per-node N` runs the same program on the same prompts.  As what they sum up is equal to
the bit on all of them, so are their logits, their choices and their schedules: nothing else has to be agreed on.

Shapes: T tokens, H query heads, J key/value heads, C head_dim, Q and X the widths of this rank's heads.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from m27quant.checkpoint.config import M2Config
from m27quant.errors import EnvironmentFault, UsageError
from m27quant.kernels.rotary import rotate
from m27quant.runtime.layer import AttentionWeights


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that share a model."""

    rank: int = 0
    size: int = 1

    def part(self, count: int) -> slice:
        """This rank's share of `count` things."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def check(self, config: M2Config) -> None:
        """Raise `UsageError` where heads or experts cannot be divided evenly."""
        for name in ("num_key_value_heads", "num_attention_heads", "num_local_experts"):
            count = getattr(config, name)
            if count % self.size:
                raise UsageError(
                    f"{name} {count} cannot be divided among {self.size} ranks",
                    hint="start as many ranks as divide the key/value heads: 1, 2, 4 or 8 for MiniMax-M2",
                )

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all ranks' tensors, added in F32 in the order of ranks and rounded once; equal on all of them."""
        if self.size == 1:
            return part
        parts = [torch.empty(part.shape, device=part.device) for _ in range(self.size)]
        dist.all_gather(parts, part.float().contiguous())
        total = parts[0]
        for other in parts[1:]:
            total = total + other
        return total.to(part.dtype)

    def smallest(self, value: int, device: torch.device) -> int:
        """The least of all ranks' values."""
        if self.size == 1:
            return value
        found = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return int(found)

    def attention(self, w: AttentionWeights) -> AttentionWeights:
        """This rank's heads."""
        if self.size == 1:
            return w

        def rows(weight: Tensor) -> Tensor:
            return weight[self.part(len(weight))].clone()

        return AttentionWeights(
            input_layernorm=w.input_layernorm,
            q_proj=rows(w.q_proj),
            k_proj=rows(w.k_proj),
            v_proj=rows(w.v_proj),
            o_proj=w.o_proj[:, self.part(w.o_proj.shape[1])].clone(),
            q_norm=rows(w.q_norm),
            k_norm=rows(w.k_norm),
        )

    def qk_norm_rope(
        self,
        q_TQ: Tensor,
        k_TX: Tensor,
        q_norm_Q: Tensor,
        k_norm_X: Tensor,
        cos: Tensor,
        sin: Tensor,
        head_dim: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """`kernels.rotary.qk_norm_rope` where the norm runs over the heads of all ranks together."""
        squares_T2 = torch.stack([x.double().square().sum(-1) for x in (q_TQ, k_TX)], dim=-1)
        parts = [torch.empty_like(squares_T2) for _ in range(self.size)]
        dist.all_gather(parts, squares_T2)
        total_T2 = torch.stack(parts).sum(0)
        found = []
        for index, (x, norm) in enumerate(((q_TQ, q_norm_Q), (k_TX, k_norm_X))):
            mean = (total_T2[:, index, None] / (x.shape[1] * self.size)).float()
            normed = (x.float() * (1.0 / torch.sqrt(mean + eps))).to(x.dtype)
            scaled = (norm.float() * normed.float()).to(x.dtype)
            found.append(rotate(scaled.view(len(x), -1, head_dim), cos, sin))
        return found[0], found[1]


ALONE = Ranks()


def join(device: torch.device) -> Ranks:
    """The ranks that torchrun started, over NCCL on GPUs and Gloo elsewhere; one where it started none.

    Raises:
        EnvironmentFault: they cannot reach each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size <= 1:
        return ALONE
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as fault:
            raise EnvironmentFault(
                f"the {size} ranks cannot reach each other: {fault}",
                hint="start them with torchrun --nproc-per-node N",
            ) from None
        atexit.register(leave)  # threads that a group left behind would abort a process that ends
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """End the group that `join` made, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(name: str) -> str:
    """`auto` and `cuda` are this rank's own GPU."""
    local = os.environ.get("LOCAL_RANK")
    on_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return f"cuda:{local}" if local is not None and on_gpu else name
