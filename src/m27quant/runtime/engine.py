"""The engine: one step computes what the scheduler chose, accepts drafts, and hands out what is new."""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from m27quant.runtime.batch import Part, build_rows, wanted_rows
from m27quant.runtime.graphs import MAX_ROWS, Graphs
from m27quant.runtime.kv_cache import KvCache
from m27quant.runtime.model import Model
from m27quant.runtime.sampling import NO_CHOICE, choose, log_probabilities
from m27quant.runtime.scheduler import Scheduled, Scheduler
from m27quant.runtime.sequence import Sequence, TokenLogprobs
from m27quant.runtime.speculative.acceptance import accept
from m27quant.runtime.speculative.proposal import NOTHING, Drafter, DraftRequest, Proposal, check_proposal


@dataclass(slots=True)
class Totals:
    """Of all steps so far."""

    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_output_tokens: int = 0
    draft_s: float = 0.0
    forward_s: float = 0.0
    """The target's forward passes and the choice of tokens."""


class Engine:
    """Model, cache, scheduler and drafter together."""

    def __init__(
        self, model: Model, cache: KvCache, scheduler: Scheduler, drafter: Drafter | None = None
    ) -> None:
        self.model, self.cache, self.scheduler, self.drafter = model, cache, scheduler, drafter
        self.taps = drafter.taps if drafter else ()
        self.graphs: Graphs | None = None
        """Takes decoding steps, where there is one."""
        self.totals = Totals()

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Compute one batch; returns the sequences that have a new token or are finished."""
        started = time.perf_counter()
        batch = self.scheduler.schedule()
        self._forget(self.scheduler.take_preempted())
        if not batch:
            return []
        parts = self._draft(batch)
        drafted = time.perf_counter()
        logits_RV = self._forward(parts)
        choices = choose(logits_RV, [row for part in parts for row in part.choices()])
        chosen = time.perf_counter()
        self._account(parts, drafted - started, chosen - drafted, chosen)
        return self._emit(parts, choices, logits_RV)

    def cancel(self, sequence: Sequence) -> None:
        """Stop a sequence, whatever it is doing; the others do not notice."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            self._retire(sequence)

    def _draft(self, batch: Many[Scheduled]) -> list[Part]:
        """Ask for drafts where there is use and room for them."""
        wanting = [scheduled for scheduled in batch if scheduled.num_drafts] if self.drafter else []
        proposals: dict[int, Proposal] = {}
        if wanting and self.drafter:
            found = self.drafter.propose([self._request(scheduled) for scheduled in wanting])
            for scheduled, proposal in zip(wanting, found, strict=True):
                check_proposal(proposal, scheduled.num_drafts, self.model.config.vocab_size)
                proposals[scheduled.sequence.number] = proposal
        return [Part(scheduled, proposals.get(scheduled.sequence.number, NOTHING)) for scheduled in batch]

    def _request(self, scheduled: Scheduled) -> DraftRequest:
        sequence, taps = scheduled.sequence, None
        if self.cache.taps is not None:
            slots = self.cache.slots(sequence.blocks, sequence.num_tapped, sequence.num_computed)
            taps = self.cache.taps[
                torch.tensor(slots, dtype=torch.int64, device=self.cache.taps.device)
            ].flatten(1)
            sequence.num_tapped = sequence.num_computed
        return DraftRequest(sequence.number, sequence.tokens, taps, scheduled.num_drafts)

    def _forward(self, parts: Many[Part]) -> Tensor:
        """F32 logits of every row that a token is chosen behind."""
        rows = build_rows(parts, self.cache, self.model.device)
        decoding = all(part.num_choices == part.num_rows for part in parts)
        if self.graphs is not None and decoding and len(rows.ids_T) <= MAX_ROWS:
            return self.graphs.logits(rows)
        x_TD = self.model.forward(rows, self.cache, self.taps)
        return self.model.logits(x_TD[wanted_rows(parts, self.model.device)])

    def _emit(self, parts: Many[Part], choices: list[int], logits_RV: Tensor) -> list[Sequence]:
        """Accept what the target chose itself; what was drafted beside that is gone with the next step."""
        sources: list[int] = []
        targets: list[int] = []
        row = 0
        for part in parts:
            sequence, end = part.sequence, part.scheduled.end
            mine = slice(row, row + part.num_choices)
            kept = self._take(part, choices[mine], logits_RV[mine])
            for depth, node in enumerate(kept):
                if node != depth:  # a tree's accepted path becomes contiguous
                    sources += self.cache.slots(sequence.blocks, end + node, end + node + 1)
                    targets += self.cache.slots(sequence.blocks, end + depth, end + depth + 1)
            if part.scheduled.is_decoding:
                sequence.timing.accepted.append(len(kept))
            self.scheduler.computed(sequence, end + len(kept))
            row += part.num_choices
        self.cache.move(sources, targets)
        changed = [part.sequence for part in parts if part.num_choices]
        for sequence in changed:
            if sequence.finish_reason is not None:
                self._retire(sequence)
        return changed

    def _take(self, part: Part, choices: list[int], logits_RV: Tensor) -> list[int]:
        """Append a sequence's new tokens up to one that ends it; returns the drafts among them."""
        if not choices:
            return []
        sequence = part.sequence
        accepted = accept(part.proposal, choices)
        row = 0
        for count, token in enumerate(accepted.tokens, 1):
            if token == NO_CHOICE:
                sequence.finish_reason, sequence.error = (
                    "error",
                    "there is no token to choose: the model's logits are NaN or infinite, or settings exclude all",
                )
                return accepted.nodes[: count - 1]
            if sequence.params.logprobs is not None:
                found = log_probabilities(logits_RV[row], token, sequence.params.logprobs)
                sequence.logprobs.append(TokenLogprobs(token, *found))
            sequence.append(token)
            self.totals.num_output_tokens += 1
            if sequence.finish_reason is not None:
                return accepted.nodes[:count]
            row = accepted.nodes[count - 1] + 1 if count <= len(accepted.nodes) else 0
        return accepted.nodes

    def _retire(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self._forget([sequence])
        if sequence.text is not None:
            sequence.text.finish()
        sequence.timing.finished = time.perf_counter()

    def _forget(self, sequences: Many[Sequence]) -> None:
        for sequence in sequences:
            sequence.num_tapped = 0
            if self.drafter is not None:
                self.drafter.forget(sequence.number)

    def _account(self, parts: Many[Part], draft_s: float, forward_s: float, now: float) -> None:
        self.totals.num_steps += 1
        self.totals.draft_s += draft_s
        self.totals.forward_s += forward_s
        for part in parts:
            timing = part.sequence.timing
            if part.scheduled.is_decoding:
                timing.drafted.append(len(part.proposal.tokens))
                timing.draft_s += draft_s
                timing.verify_s += forward_s
            else:
                timing.prefill_s += forward_s
                self.totals.num_prefill_tokens += part.scheduled.end - part.scheduled.begin
            if part.num_choices and timing.first_token is None:
                timing.first_token = now
