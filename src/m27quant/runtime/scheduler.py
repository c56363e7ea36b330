"""What the next step computes: for each sequence how many tokens, within a budget of tokens and of cache blocks.

First come, first served.  Sequences that only need their next token go first, so that a long prompt, taken in
chunks, does not hold them up.  Where blocks run out the youngest sequence gives up its own and is computed again later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from m27quant.runtime.blocks import Blocks, extend_hashes
from m27quant.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence's part of a step: positions begin to end - 1."""

    sequence: Sequence
    begin: int
    end: int
    num_drafts: int
    """Drafted tokens that there is use and room for behind them."""
    is_last: bool
    """The step gives the next token."""
    is_decoding: bool
    """It does nothing else."""


class Scheduler:
    """Sequences that wait and sequences that run."""

    def __init__(
        self, blocks: Blocks, *, max_num_seqs: int, max_num_batched_tokens: int, num_draft_tokens: int
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.num_draft_tokens = num_draft_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._preempted: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's tokens and see to their blocks."""
        batch: list[Scheduled] = []
        budget = self.max_num_batched_tokens
        for sequence in sorted(self.running, key=lambda s: not s.is_decoding):  # stable: oldest first
            if budget and sequence in self.running:  # it may have been preempted by an older one
                budget -= self._schedule(sequence, budget, batch)
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            if self._preempted or not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._schedule(sequence, budget, batch)
        return [part for part in batch if part.sequence in self.running]

    def computed(self, sequence: Sequence, num_computed: int) -> None:
        """So many positions are in the cache now; full blocks become known."""
        sequence.num_computed = num_computed
        size = self.blocks.block_size
        extend_hashes(sequence.hashes, sequence.tokens, size, num_computed)
        for index in range(sequence.num_published, num_computed // size):
            self.blocks.publish(sequence.blocks[index], sequence.hashes[index])
            sequence.num_published = index + 1

    def take_preempted(self) -> list[Sequence]:
        """Sequences that lost their cache since this was last asked."""
        taken, self._preempted = self._preempted, []
        return taken

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)

    def _schedule(self, sequence: Sequence, budget: int, batch: list[Scheduled]) -> int:
        """Add a sequence's part to the batch; returns its tokens, 0 where it had to give way."""
        begin = sequence.num_computed
        end = begin + min(sequence.num_uncomputed, budget)
        if not self._make_room(sequence, end):
            return 0
        num_drafts = self._room_for_drafts(sequence, min(budget - 1, self.num_draft_tokens))
        is_last = end == len(sequence.tokens)
        batch.append(Scheduled(sequence, begin, end, num_drafts, is_last, sequence.is_decoding))
        return end - begin + num_drafts

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for so many tokens, taken from younger sequences if need be; False: it was preempted itself."""
        missing = self.blocks.count(num_tokens) - len(sequence.blocks)
        while (new := self.blocks.allocate(max(missing, 0))) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += new
        return True

    def _room_for_drafts(self, sequence: Sequence, most: int) -> int:
        """How many drafts are of use and fit; for them nobody is preempted."""
        if not sequence.is_decoding:
            return 0
        length = len(sequence.tokens)
        useful = max(0, min(most, sequence.max_length - length - 1))
        missing = self.blocks.count(length + useful) - len(sequence.blocks)
        sequence.blocks += self.blocks.allocate(min(max(missing, 0), self.blocks.num_free)) or []
        return min(useful, len(sequence.blocks) * self.blocks.block_size - length)

    def _admit(self, sequence: Sequence) -> bool:
        """Reuse what the cache has of a sequence; False while there is no room for the rest of its tokens."""
        size, length = self.blocks.block_size, len(sequence.tokens)
        extend_hashes(sequence.hashes, sequence.tokens, size, length)
        # the last token has to be computed, in a block that nobody else holds
        reused = self.blocks.reuse(sequence.hashes[: (length - 1) // size])
        if self.blocks.count(length) - len(reused) > self.blocks.num_free and self.running:
            self.blocks.release(reused)
            return False
        sequence.blocks = reused
        sequence.num_published = len(reused)
        sequence.num_computed = len(reused) * size
        if not sequence.timing.num_preemptions:
            sequence.timing.num_reused = min(sequence.num_computed, sequence.num_prompt)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self._free(sequence)
        sequence.timing.num_preemptions += 1
        self._preempted.append(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_published = sequence.num_computed = sequence.num_tapped = 0
