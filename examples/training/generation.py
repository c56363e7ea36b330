"""Greedy text of the plain model, and how much of it repeats itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from model import KVCache, ModelConfig, Parameters, forward
from torch import Tensor

NGRAM = 8


@torch.no_grad()
def generate_greedy(
    params: Parameters, bias: Tensor, prompts: Tensor, num_tokens: int, config: ModelConfig
) -> Tensor:
    """The most likely next token, `num_tokens` times, nothing else: prompts [B, P] -> [B, P + num_tokens]."""
    batch, prompt_len = prompts.shape
    ids = prompts.new_zeros(batch, prompt_len + num_tokens)
    ids[:, :prompt_len] = prompts
    cache = KVCache.empty(config, batch, prompt_len + num_tokens, params["embed"])
    for position in range(prompt_len, prompt_len + num_tokens):
        hidden = forward(params, bias, ids[:, cache.length : position], config, cache=cache)
        last = hidden.view(batch, -1, config.hidden_size)[:, -1]
        ids[:, position] = F.linear(last, params["head"]).float().argmax(-1)
    return ids


def repeats(ids: Tensor, prompt_len: int, n: int = NGRAM) -> Tensor:
    """Bool like ids [B, L]: True where a token after the prompt ends an n-gram seen earlier in its row."""
    flags = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(ids.tolist()):
        seen: set[tuple[int, ...]] = set()
        for end in range(n, len(tokens) + 1):
            ngram = tuple(tokens[end - n : end])
            flags[row, end - 1] = end > prompt_len and ngram in seen
            seen.add(ngram)
    return flags


def loop_share(ids: Tensor, prompt_len: int, n: int = NGRAM) -> float:
    """Share of the n-grams ending after the prompt that occurred before in prompt or text, mean over rows."""
    return repeats(ids, prompt_len, n)[:, prompt_len:].float().mean().item()
