"""What an answer took, in OpenAI's words and in the runtime's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m27quant.runtime.sequence import Sequence as Running


def usage_document(sequences: Sequence[Running], num_reasoning: int, *, prompts_of: int) -> dict[str, Any]:
    """Token counts of a request.

    `m27quant.accepted[k]` counts the verify steps in which the draft at position k was accepted, so that with
    `verify_steps` a client computes the very acceptance that `run --stats` shows; a step counts whether or not
    anything was drafted, the prompt's own is none.

    Args:
        sequences: all answers, finished, choices of one prompt beside each other.
        num_reasoning: their tokens that were thoughts.
        prompts_of: the number of prompts.
    """
    each = max(1, len(sequences) // max(1, prompts_of))
    firsts = sorted(sequences, key=lambda s: s.number)[::each]
    prompt, output = sum(s.num_prompt for s in firsts), sum(s.num_output for s in sequences)
    accepted = [count for s in sequences for count in s.timing.accepted]
    drafted = sum(sum(s.timing.drafted) for s in sequences)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(s.timing.num_reused for s in firsts)},
        "completion_tokens_details": {
            "reasoning_tokens": num_reasoning,
            "accepted_prediction_tokens": sum(accepted),
            "rejected_prediction_tokens": max(0, drafted - sum(accepted)),
        },
        "m27quant": {"verify_steps": len(accepted), "accepted": per_position(accepted)},
    }


def per_position(accepted: Sequence[int]) -> list[int]:
    """From drafts accepted in each step to steps that accepted the k-th draft, k from 0."""
    return [sum(count > k for count in accepted) for k in range(max(accepted, default=0))]
