"""Text health: signs of a sick text per text, tool calls that hold, all with intervals.

Shapes: N texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from m27quant.evaluation.result import Estimate
from m27quant.evaluation.statistics import Bootstrap, Statistic
from m27quant.evaluation.tool_prompts import is_valid_call
from m27quant.evaluation.writing import Written
from m27quant.verify.text_health import counts

Z = 1.959963984540054
"""Normal quantile of 97.5 %."""


def text_health(written: Written, seed: int = 0) -> dict[str, Any]:
    """Spurious spaces per word, repeated 8-grams and broken characters as shares, and valid tool calls.

    Returns:
        `num_texts`; `spurious_spaces`, `repetition`, `broken_characters` (ratios of sums over all texts, texts
        resampled); `num_tool_prompts`; `valid_tool_calls` (share of these), None without any.
    """
    signs = torch.tensor([counts(a.text, a.token_ids) for a in written.answers], dtype=torch.float64)
    bootstrap = Bootstrap(len(signs), seed)
    estimates = {
        name: bootstrap.estimate(_ratio(signs[:, column], signs[:, column + 1]))
        for name, column in (("spurious_spaces", 0), ("repetition", 2), ("broken_characters", 4))
    }
    valid = [
        is_valid_call(answer.text, prompt.tools, thinking=prompt.thinking)
        for prompt, answer in zip(written.prompts, written.answers, strict=True)
        if prompt.tools
    ]
    return {
        "num_texts": len(signs),
        **{name: estimate.to_json() for name, estimate in estimates.items()},
        "num_tool_prompts": len(valid),
        "valid_tool_calls": share_of(valid).to_json() if valid else None,
    }


def _ratio(signs_N: torch.Tensor, places_N: torch.Tensor) -> Statistic:
    """A text without a place for a sign (no word, fewer than 8 tokens) has none."""
    return lambda weights_RN: (weights_RN @ signs_N) / (weights_RN @ places_N).clamp(min=1)


def share_of(flags: Sequence[bool]) -> Estimate:
    """The share that is true, with Wilson's interval."""
    return wilson(sum(flags), len(flags))


def wilson(true: int, n: int) -> Estimate:
    """The share true / n, with Wilson's 95 % interval (JASA 1927), which is right for few and at 0 and 1, too."""
    share, scale = true / n, 1 + Z * Z / n
    middle = (share + Z * Z / (2 * n)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return Estimate(
        share, max(0.0, middle - half) if true else 0.0, min(1.0, middle + half) if true < n else 1.0
    )
