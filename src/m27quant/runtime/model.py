"""A whole forward pass over a source checkpoint, streamed: one layer, one expert at a time in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from m27quant.checkpoint import names
from m27quant.checkpoint.source import Source
from m27quant.errors import UsageError
from m27quant.runtime import layer as M
from m27quant.runtime.loader import attention_weights, dequantize_linear, read_plain, router_weights


@torch.inference_mode()
def logits(
    source: Source,
    input_ids: list[int] | torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Logits [T, vocab_size] (in `dtype`) of one sequence of T token ids; weights are the BF16 dequantization.

    Raises:
        UsageError: no tokens, or ids outside of the vocabulary.
        CheckpointError: damaged weights.
    """
    config, device = source.config, torch.device(device)
    ids = torch.as_tensor(input_ids, dtype=torch.int64).reshape(-1)
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise UsageError(f"input_ids must be 1 or more ids from 0 to {config.vocab_size - 1}")
    x = F.embedding(ids, read_plain(source, names.EMBEDDING)).to(device, dtype)
    rotary = M.rotary_table(torch.arange(len(ids), device=device), config, dtype)
    for index in range(config.num_hidden_layers):
        x = M.attention_block(
            x, attention_weights(source, index, device, dtype), config, rotary, M.causal_attention
        )
        x = x + _moe(source, index, x, device, dtype)
    x = M.rms_norm(x, read_plain(source, names.FINAL_NORM).to(device, dtype), config.rms_norm_eps)
    return F.linear(x, read_plain(source, names.LM_HEAD).to(device, dtype))


def _moe(
    source: Source, index: int, x: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    config = source.config
    weights = router_weights(source, index, device, dtype)
    h = M.moe_input(x, weights, config)
    routed = M.assignments(M.route(h, weights, config.num_experts_per_tok), config.num_local_experts)
    y = torch.zeros_like(h)
    for expert in range(config.num_local_experts):
        to = routed[expert]
        if not len(to.rows):
            continue
        w1, w2, w3 = (
            dequantize_linear(source, names.expert(index, expert, p), device, dtype)
            for p in names.EXPERT_PROJECTIONS
        )
        M.add_expert(y, M.gated_activation(h[to.rows], w1, w3), w2, to)
    return y
