"""Engines of any size around one loaded model, and drafters that guess right, wrong or at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.quantized import open_checkpoint
from m27quant.runtime.api import LLM
from m27quant.runtime.batch import Part, build_rows
from m27quant.runtime.generation import SamplingParams
from m27quant.runtime.kv_cache import CacheShape, KvCache
from m27quant.runtime.memory import MemoryPlan
from m27quant.runtime.model import Model
from m27quant.runtime.options import RunOptions
from m27quant.runtime.scheduler import Scheduled
from m27quant.runtime.sequence import Sequence as Running
from m27quant.runtime.sequence import Timing
from m27quant.runtime.speculative.proposal import NOTHING, ROOT, Drafter, DraftRequest, Proposal
from m27quant.runtime.weights import Form, choose_form, load_model

CPU = torch.device("cpu")


class Loaded:
    """A checkpoint's weights, for any number of engines."""

    def __init__(self, folder: Path, *, invariant: bool = True, **form: Any) -> None:
        settings: dict[str, Any] = {
            "activations": "auto",
            "kv_cache_dtype": "auto",
            "dtype": torch.bfloat16,
            "device": CPU,
        }
        self.folder = folder
        with open_checkpoint(Location(folder)) as source:
            self.form: Form = choose_form(source, **(settings | form))
            longest = source.config.max_position_embeddings
            self.model: Model = load_model(source, self.form, max_length=longest, invariant=invariant)

    def engine(self, *, num_blocks: int = 64, drafter: Drafter | None = None, **options: Any) -> LLM:
        """An engine whose cache has so many blocks, NaN where nothing was written."""
        settings = RunOptions(**options)
        config = self.model.config
        shape = CacheShape(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=self.form.kv_dtype,
            block_size=settings.block_size,
            num_taps=len(drafter.taps) if drafter else 0,
            hidden_size=config.hidden_size,
            taps_dtype=self.form.dtype,
        )
        cache = KvCache(shape, num_blocks, CPU)
        for tensor in (*cache.keys, *cache.values):
            tensor.view(torch.uint8).fill_(0xFF)  # NaN in FP8, BF16 and F32
        if cache.taps is not None:
            cache.taps.fill_(torch.nan)
        plan = MemoryPlan(
            device=CPU, budget_bytes=0, base_bytes=0, weight_bytes=0, drafter_bytes=0, step_bytes=0, cache_bytes=0,
            num_blocks=num_blocks, block_size=settings.block_size,
        )  # fmt: skip
        return LLM(self.model, cache, self.folder, settings, plan, drafter)


class GuessingDrafter:
    """Random trees, into which the tokens that `truth` says come next are mixed, at a random path.

    It also checks what the engine promises of taps, where it asks for some.
    """

    def __init__(
        self,
        vocab_size: int,
        truth: Callable[[list[int]], list[int]] = lambda tokens: [],
        *,
        seed: int = 0,
        num_draft_tokens: int = 6,
        taps: tuple[int, ...] = (),
        chain: bool = False,
    ) -> None:
        self.taps, self.num_draft_tokens, self.max_depth = taps, num_draft_tokens, num_draft_tokens
        self._vocab_size, self._truth, self._chain = vocab_size, truth, chain
        self._random = random.Random(seed)
        self.tapped: dict[int, list[torch.Tensor]] = {}
        self.asked: dict[int, list[int]] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Proposal]:
        return [self._propose(request) for request in requests]

    def forget(self, sequence: int) -> None:
        self.tapped.pop(sequence, None)

    def _propose(self, request: DraftRequest) -> Proposal:
        self.asked[request.sequence] = list(request.tokens)
        if self.taps:
            assert request.taps is not None
            known = self.tapped.setdefault(request.sequence, [])
            known.append(request.taps.clone())
            assert sum(map(len, known)) == len(request.tokens) - 1, "every committed position once"
            assert all(t.isfinite().all() for t in known)
        else:
            assert request.taps is None
        count = self._random.randint(0, min(request.max_tokens, self.num_draft_tokens))
        truth = self._truth(request.tokens)
        tokens: list[int] = []
        parents: list[int] = []
        path = [ROOT]
        while len(tokens) < count:
            depth = len(path) - 1
            if depth < len(truth) and self._random.random() < 0.6:  # one step along the true path
                parent, token = path[-1], truth[depth]
            else:
                parent = len(tokens) - 1 if self._chain else self._random.randint(ROOT, len(tokens) - 1)
                token = self._random.randrange(self._vocab_size)
            if self._chain and parent != len(tokens) - 1:
                break
            if any((p, t) == (parent, token) for p, t in zip(parents, tokens, strict=True)):
                continue
            tokens.append(token)
            parents.append(parent)
            if parent == path[-1] and depth < len(truth) and token == truth[depth]:
                path.append(len(tokens) - 1)
        return Proposal(tokens, parents)


@dataclass(frozen=True)
class States:
    """Everything that a forward pass of one sequence leaves behind."""

    logits: torch.Tensor
    """[T, V]."""
    hidden: torch.Tensor
    """[L + 1, T, D]: embeddings, then behind every layer."""
    keys: list[torch.Tensor]
    """[T, J, C] of each layer, as the cache has them."""
    values: list[torch.Tensor]


def logits_in_pieces(loaded: Loaded, ids: torch.Tensor, pieces: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] of every position of one sequence, computed in pieces of these lengths."""
    return states_of(loaded, ids, pieces).logits


@torch.inference_mode()
def states_of(loaded: Loaded, ids: torch.Tensor, pieces: Sequence[int] = ()) -> States:
    """Run one sequence through the engine's model, in pieces of these lengths or at once."""
    taps = tuple(range(loaded.model.config.num_hidden_layers + 1))
    drafter = GuessingDrafter(1, taps=taps)
    cache = loaded.engine(num_blocks=-(-len(ids) // 16) + 1, drafter=drafter).engine.cache
    sequence = running(ids.tolist())
    sequence.blocks = list(range(cache.num_blocks))[::-1]  # not in order
    found = []
    begin = 0
    for length in pieces or [len(ids)]:
        part = Part(Scheduled(sequence, begin, begin + length, 0, False, False), NOTHING)
        rows = build_rows([part], cache, CPU)
        found.append(loaded.model.logits(loaded.model.forward(rows, cache, taps)))
        begin += length
    assert begin == len(ids)
    slots = torch.tensor(cache.slots(sequence.blocks, 0, len(ids)))
    assert cache.taps is not None

    def taken(caches: list[torch.Tensor]) -> list[torch.Tensor]:
        return [c.flatten(0, 1).view(torch.uint8)[slots].view(c.dtype) for c in caches]

    return States(torch.cat(found), cache.taps[slots].transpose(0, 1), taken(cache.keys), taken(cache.values))


def running(tokens: list[int]) -> Running:
    """A sequence that no scheduler knows."""
    return Running(
        number=0, tokens=tokens, num_prompt=len(tokens), params=SamplingParams(), seed=0, stop_ids=frozenset(),
        max_length=len(tokens) + 1, text=None, timing=Timing(arrived=0.0),
    )  # fmt: skip
