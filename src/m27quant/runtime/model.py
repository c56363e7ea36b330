"""The logits of one sequence by any checkpoint, streamed: one layer, one expert at a time in memory."""

from __future__ import annotations

import torch

from m27quant.checkpoint.source import Source
from m27quant.errors import UsageError
from m27quant.runtime.streamed import Batch, Precision, StreamedModel


@torch.inference_mode()
def logits(
    source: Source,
    input_ids: list[int] | torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    precision: Precision | None = None,
) -> torch.Tensor:
    """Logits [T, vocab_size] (in `dtype`) of one sequence of T token ids.

    FP8 weights are taken as their BF16 dequantization, NVFP4 weights as what they stand for.

    Raises:
        UsageError: no tokens, or ids outside of the vocabulary.
        CheckpointError: damaged weights.
    """
    config = source.config
    ids = torch.as_tensor(input_ids, dtype=torch.int64).reshape(-1)
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise UsageError(f"input_ids must be 1 or more ids from 0 to {config.vocab_size - 1}")
    batch = Batch(ids, (len(ids),))
    model = StreamedModel(source, [batch], precision=precision, device=torch.device(device), dtype=dtype)
    for index in range(config.num_hidden_layers):
        model.layer(index)
    return model.head()(batch.x)
