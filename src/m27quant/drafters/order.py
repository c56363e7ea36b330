"""Which samples a step learns from: a pure function of seed, epoch and step, however it is split over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

WINDOW = 16
"""Batches within which samples are sorted by length, so that little of a batch is padding."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sample of a batch and the epoch that it is read in."""

    index: int
    epoch: int


class Order:
    """Batches of `size` out of samples of these lengths; an epoch reads each sample once, and fills its last batch."""

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self._lengths, self.size, self._seed = list(lengths), size, seed
        self.steps_per_epoch = -(-len(self._lengths) // size)
        self._epoch = lru_cache(maxsize=2)(self._make)

    def batch(self, step: int) -> list[Drawn]:
        """What step `step` learns from, counted from 0."""
        epoch, at = divmod(step, self.steps_per_epoch)
        return [Drawn(index, epoch) for index in self._epoch(epoch)[at]]

    def _make(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(mixed(self._seed, "epoch", epoch))
        count, size = len(self._lengths), self.size
        order = torch.randperm(count, generator=generator).tolist()
        order = [order[n % count] for n in range(self.steps_per_epoch * size)]
        batches: list[list[int]] = []
        for begin in range(0, len(order), WINDOW * size):
            window = sorted(
                order[begin : begin + WINDOW * size], key=lambda index: (self._lengths[index], index)
            )
            batches += [window[at : at + size] for at in range(0, len(window), size)]
        return [batches[n] for n in torch.randperm(len(batches), generator=generator).tolist()]


def generator_of(seed: int, drawn: Drawn) -> torch.Generator:
    """Of what is random about a sample in an epoch (its anchors), wherever it is computed."""
    return torch.Generator().manual_seed(mixed(seed, drawn.epoch, drawn.index))


def mixed(*parts: object) -> int:
    """63 bits that hang on all parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
