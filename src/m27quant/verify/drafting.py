"""A drafter at work on a checkpoint: the same text as without it, enough of its drafts accepted, its taps in place."""

from __future__ import annotations

import statistics
from typing import Any

from m27quant.runtime.api import LLM
from m27quant.runtime.generation import SamplingParams
from m27quant.runtime.lossless import compare_with_plain
from m27quant.runtime.probe import hidden_states_of
from m27quant.runtime.speculative.lengths import accepted_lengths, clearly_longer
from m27quant.runtime.speculative.proposal import Drafter
from m27quant.verify.collect import Findings

FIRST_START, NUM_TEXTS, TEXT_TOKENS = 16, 32, 128
"""Texts that taps are measured on: continuations of so many beginnings of the probe, of so many tokens."""
MIN_TAU = 1.1
"""Below it a step gives hardly more than one token, and drafting only costs."""


def check_drafting(
    llm: LLM, name: str, prompts: list[list[int]], probe: list[int], max_tokens: int, found: Findings
) -> dict[str, Any]:
    """Generate with and without the drafter and measure its taps; returns the figures."""
    params = [SamplingParams(temperature=0.0, max_tokens=max_tokens, repetition_penalty=1.0)] * len(prompts)
    comparison = compare_with_plain(llm, prompts, params)
    steps = [r.stats.acceptance for r in comparison.results]
    total = sum(a.num_steps for a in steps)
    m_accept = sum(a.num_accepted for a in steps) / total if total else 0.0
    if comparison.first is not None:
        first = comparison.first
        margin = (
            "" if first.margin is None else f", where the two likeliest are {first.margin:.3g} nats apart"
        )
        found.add(
            "M27-O010" if llm.model.invariant else "M27-O013",
            f"{name}: {comparison.num_different} of {len(prompts)} texts differ from those without the drafter, the "
            f"first at token {first.position}{margin}",
            expected=first.plain_token, found=first.token,
        )  # fmt: skip
    if total and 1 + m_accept < MIN_TAU:
        found.add(
            "M27-O012", f"{name}: {1 + m_accept:.2f} tokens a step", expected=f"at least {MIN_TAU:g}",
            found=f"{1 + m_accept:.3f}",
        )  # fmt: skip
    drafter = llm.engine.drafter
    shifts = _shifts(llm, drafter, probe, name, found) if drafter is not None and drafter.taps else {}
    return {
        "tau": 1 + m_accept,
        "m_accept": m_accept,
        "c_k": _shares(steps),
        "is_lossless": comparison.is_lossless,
        "num_prompts": len(prompts),
        "tokens_per_s": comparison.tokens_per_s,
        "tokens_per_s_without_drafter": comparison.plain_tokens_per_s,
        "m_accept_by_shift": shifts,
    }


def _shares(steps: list[Any]) -> list[float]:
    """C_k over all steps of all texts."""
    total = sum(a.num_steps for a in steps)
    longest = max((len(a.c_k) for a in steps), default=0)
    counts = [sum(a.c_k[k] * a.num_steps for a in steps if k < len(a.c_k)) for k in range(longest)]
    return [count / total for count in counts] if total else []


def _shifts(llm: LLM, drafter: Drafter, probe: list[int], name: str, found: Findings) -> dict[str, float]:
    """Drafts accepted at a position of the target's own texts, with the taps as they are and one layer up and down."""
    begun = [probe[:end] for end in range(FIRST_START, len(probe), max(1, len(probe) // NUM_TEXTS))][
        :NUM_TEXTS
    ]
    greedy = SamplingParams(temperature=0.0, max_tokens=TEXT_TOKENS, repetition_penalty=1.0, ignore_eos=True)
    with llm.without_drafter():
        results = llm.generate(begun, greedy)
    texts = [ids + result.token_ids for ids, result in zip(begun, results, strict=True)]
    starts = [len(ids) for ids in begun]
    lengths: dict[int, list[int]] = {}
    for shift in (0, -1, 1):
        states = tuple(state + shift for state in drafter.taps)
        if all(0 <= state <= llm.model.config.num_hidden_layers for state in states):
            taps = [hidden_states_of(llm.model, text, states) for text in texts]
            lengths[shift] = accepted_lengths(drafter, texts, starts, taps)
    mean = {shift: statistics.fmean(counts) for shift, counts in lengths.items() if counts}
    best = max(mean, key=mean.__getitem__, default=0)
    if best and clearly_longer(lengths[best], lengths[0]):
        found.add(
            "M27-O011",
            f"{name}: with taps at hidden states {[state + best for state in drafter.taps]} more of its drafts are "
            f"accepted than with {list(drafter.taps)}, at {len(lengths[0])} positions",
            expected=f"{mean[best]:.2f} a step", found=f"{mean[0]:.2f}",
        )  # fmt: skip
    return {f"{shift:+d}" if shift else "0": share for shift, share in mean.items()}
