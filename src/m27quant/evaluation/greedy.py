"""Where a candidate's greedy text leaves the reference's.

Behind a prompt the greedy text of a model is c_1, c_2, ..., each c_i the likeliest token behind the prompt and c_1 ..
c_(i-1), until an end token or the limit.  The divergence point of two models is the number n of tokens with which both
of their greedy texts begin.

Where both models can write, both texts are there and n is counted.  Where only one can (a candidate has a quarter of
its source's bytes), one forward pass of the other over prompt and text gives the same n: it is the first place i - 1
at which the other's likeliest token t_i behind the prompt and c_1 .. c_(i-1) is not c_i.  For by induction its own text
begins with c_1 .. c_(i-1) as long as each t_j before was c_j, so t_i is the i-th token of its own greedy text.  Behind
the first difference the pass sees a text that is not its own, and nothing there is used.  n is symmetric, so it does
not matter which of the two has written.  What remains are near ties that two ways of rounding the same sums decide
differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from m27quant.checkpoint.source import Source
from m27quant.runtime.streamed import Batch, Precision, StreamedModel, make_batches

BATCH_TOKENS = 2048
LOGIT_ELEMENTS = 2**24
"""Logits that are in memory at a time."""

Text = tuple[Sequence[int], Sequence[int]]
"""Tokens of a prompt, and of the greedy text behind it."""


@dataclass(frozen=True, slots=True)
class Common:
    """What two greedy texts behind one prompt have in common."""

    num_tokens: int
    """The divergence point; all of the text where it is identical."""
    is_identical: bool
    """To the end token, or to the limit."""


def compare_texts(reference: Sequence[Text], candidate: Sequence[Text]) -> list[Common]:
    """Both have written behind the same prompts."""
    return [_common(r, c) for (_, r), (_, c) in zip(reference, candidate, strict=True)]


def _common(reference: Sequence[int], candidate: Sequence[int]) -> Common:
    same = 0
    for ours, theirs in zip(reference, candidate, strict=False):
        if ours != theirs:
            break
        same += 1
    return Common(same, same == max(len(reference), len(candidate)))


@torch.inference_mode()
def compare_streamed(
    texts: Sequence[Text],
    other: Source,
    *,
    precision: Precision | None = None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    stop: Callable[[], None] = lambda: None,
) -> list[Common]:
    """One has written; the other goes along its texts, a layer and an expert in memory at a time.

    Args:
        texts: none of them empty.
        other: the model that did not write.
        precision: of the other.
        device: of weights and hidden states.
        dtype: of hidden states and logits.
        stop: called between layers; may raise.

    Raises:
        CheckpointError: a weight that cannot be computed with.
    """
    sequences = [torch.tensor([*prompt, *text[:-1]], dtype=torch.int64) for prompt, text in texts]
    batches = make_batches(sequences, BATCH_TOKENS)
    model = StreamedModel(other, batches, precision=precision, device=device, dtype=dtype)
    for layer in range(other.config.num_hidden_layers):
        stop()
        model.layer(layer)
    likeliest = _likeliest(model, batches)
    found = []
    for (prompt, text), token_ids in zip(texts, likeliest, strict=True):
        own = token_ids[len(prompt) - 1 :].tolist()
        found.append(_common(own, text))
    return found


def _likeliest(model: StreamedModel, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """int64 [length] of each sequence: the likeliest token behind each of its tokens."""
    head = model.head()
    step = max(1, LOGIT_ELEMENTS // len(head.weight))
    found: list[torch.Tensor] = []
    for batch in batches:
        ids = torch.cat([head(rows).argmax(-1).cpu() for rows in torch.split(batch.x, step)])
        found += torch.split(ids, list(batch.lengths))
    return found
