"""Samples and the target's states of them, side by side.

Shapes: B sequences, T positions, F tapped features, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m27quant.drafters.batch import Batch
from m27quant.drafters.samples import Sample


def batch_of(
    samples: Sequence[Sample],
    states: Sequence[tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Batch:
    """One batch, padded on the right.

    Args:
        samples: B of them.
        states: for each (taps [T, F], final [T, D]).
        dtype: of the states in the batch, BF16 or F32.
        device: where the drafter is.
    """
    B, T = len(samples), max(len(sample) for sample in samples)
    ids_BT = torch.zeros(B, T, dtype=torch.int64)
    loss_mask_BT = torch.zeros(B, T, dtype=torch.bool)
    taps_BTF = torch.zeros(B, T, states[0][0].shape[1], dtype=dtype, device=device)
    final_BTD = torch.zeros(B, T, states[0][1].shape[1], dtype=dtype, device=device)
    for row, (sample, (taps, final)) in enumerate(zip(samples, states, strict=True)):
        length = len(sample)
        ids_BT[row, :length] = torch.frombuffer(sample.tokens, dtype=torch.int32)
        for begin, end in sample.learned:
            loss_mask_BT[row, begin:end] = True
        taps_BTF[row, :length] = taps.to(device)
        final_BTD[row, :length] = final.to(device)
    return Batch(
        ids_BT=ids_BT.to(device),
        lengths_B=torch.tensor([len(sample) for sample in samples], device=device),
        loss_mask_BT=loss_mask_BT.to(device),
        taps_BTF=taps_BTF,
        final_BTD=final_BTD,
    )
