"""What a drafter is worth while it learns: loss on held-out samples, and how many drafts of them would be accepted.

tau walks through the finished text as an engine would: a step at a time, each beginning behind the token that the last
one ended with.  For greedy text this is what generation would accept, up to the last bits of BF16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from m27quant.drafters.metrics import AcceptanceStats
from m27quant.drafters.order import Drawn, generator_of
from m27quant.drafters.samples import Sample

if TYPE_CHECKING:
    from m27quant.drafters.learn import Learner

HELDOUT_SEED = 1
"""Of anchors: the same ones at every evaluation."""


@torch.no_grad()
def measure(learner: Learner, samples: Sequence[Sample]) -> dict[str, Any]:
    """val_loss, accuracy and c_k of teacher-forced blocks; tau, m_accept and blocks of walked text."""
    size, total, stats = learner.plan.recipe.batch_size, None, AcceptanceStats()
    order = sorted(range(len(samples)), key=lambda index: (len(samples[index]), index))
    for begin in range(0, len(order), size):
        indices = order[begin : begin + size]
        chosen = [samples[index] for index in indices]
        batch = learner.batch(chosen)
        generators = [generator_of(HELDOUT_SEED, Drawn(index, 0)) for index in indices]
        report = learner.drafting.loss(learner.params, batch, generators, 0)
        total = report if total is None else total + report
        accepted = learner.drafting.accepted(learner.params, batch).tolist()
        for row, sample in zip(accepted, chosen, strict=True):
            stats += AcceptanceStats.of_steps(walk(row, sample))
    assert total is not None
    return {
        "val_loss": float(total.loss), "accuracy": total.accuracy.tolist(), "chain_rate": total.chain_rate.tolist(),
        "tau": 1 + stats.m_accept, "m_accept": stats.m_accept, "c_k": stats.c_k, "blocks": stats.num_steps,
    }  # fmt: skip


def walk(accepted_T: Sequence[int], sample: Sample) -> list[int]:
    """Drafts accepted at each step through what the target wrote; steps whose drafts lie in the text count."""
    found = []
    for begin, end in sample.learned:
        at = max(1, begin)  # the first token comes from the prompt's own forward pass
        while at < end and accepted_T[at] >= 0:
            found.append(accepted_T[at])
            at += accepted_T[at] + 1
    return found
