"""What the target's layers saw of samples: the hidden states that a drafter reads, and the ones the head reads.

Many samples go through one forward pass, side by side, each with a part of the cache of its own.  With invariant
kernels a sample's states are the same bits whatever it is batched with, and so from a cache or computed.  Without
them (`RunOptions(invariant=False)`: half the time on a CPU) the same batch gives the same bits, but another batch
may give others in the last place.

Shapes: S samples, T tokens of one, N of all, K taps, D hidden, F = K*D.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m27quant.checkpoint.hub import locate
from m27quant.checkpoint.quantized import open_checkpoint
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.drafters.samples import Sample
from m27quant.drafters.state_cache import StateCache
from m27quant.errors import UsageError, escape
from m27quant.llm import load
from m27quant.runtime.api import LLM
from m27quant.runtime.kv_cache import CacheShape, KvCache
from m27quant.runtime.model import Model, Rows
from m27quant.runtime.options import RunOptions

States = tuple[Tensor, Tensor]
"""(taps [T, F], final [T, D]), both BF16."""

UNUSED_CACHE = 2**20
"""Bytes of the engine's own cache, which nothing here is generated with."""


class TargetStates:
    """A target, and the hidden states that it has of samples."""

    def __init__(
        self, llm: LLM, fingerprint: str, *, cache_folder: Path | None, cache_bytes: int | None
    ) -> None:
        """Use a model that is loaded.

        Args:
            llm: the target.
            fingerprint: of its weights.
            cache_folder: where states are kept that were computed once; None computes them every time.
            cache_bytes: the most that is kept there; None: no limit.
        """
        self.llm, self.model, self.config = llm, llm.model, llm.model.config
        self._kv_dtype = llm.engine.cache.shape.dtype
        self._fingerprint = fingerprint
        self._folder, self._cache_bytes = cache_folder, cache_bytes
        self._caches: dict[tuple[int, ...], StateCache] = {}

    @classmethod
    def open(
        cls,
        target: str | Path,
        options: RunOptions | None = None,
        *,
        cache_folder: Path | None = None,
        cache_bytes: int | None = None,
        check: bool = True,
        revision: str | None = None,
        offline: bool = False,
        token: str | None = None,
        say: Callable[[str], None] = lambda line: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> TargetStates:
        """Load a target; arguments and errors as `m27quant.load` and `__init__`.

        Each rank loads all of it.  Kernels are invariant, on a GPU too, unless `options` says otherwise.
        """
        options = options or RunOptions()
        invariant = True if options.invariant is None else options.invariant
        options = replace(
            options, invariant=invariant, kv_cache_memory=options.kv_cache_memory or UNUSED_CACHE
        )
        llm = load(
            target, options, check=check, alone=True, revision=revision, offline=offline, token=token, say=say,
            progress=progress,
        )  # fmt: skip
        found = fingerprint_of(target, revision=revision, offline=offline, token=token)
        return cls(llm, found, cache_folder=cache_folder, cache_bytes=cache_bytes)

    @property
    def embed(self) -> Tensor:
        """[V, D]."""
        return self.model.embedding

    @property
    def head(self) -> Tensor:
        """[V, D]; logits are final @ head^T."""
        return self.model.head

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's.

        Raises:
            UsageError: it has none.
        """
        if self.llm.tokenizer is None:
            raise UsageError("the target has no tokenizer.json", hint="put it beside the weights")
        return self.llm.tokenizer

    @property
    def config_of_states(self) -> dict[str, Any]:
        """What besides the sample states depend on."""
        return {
            "target": self._fingerprint,
            "dtype": str(self.model.dtype),
            "activations": self.llm.options.activations,
            "kv_cache": str(self._kv_dtype),
            "invariant": self.model.invariant,
        }

    def of(self, samples: Sequence[Sample], hidden_states: tuple[int, ...]) -> list[States]:
        """The states of every sample, in their order.

        Args:
            samples: any number, at least one token each.
            hidden_states: which ones are tapped: 0 the embeddings, j behind layer j - 1, un-normed.

        Returns:
            For each sample its taps, side by side in the order of `hidden_states`, and what its head reads, on the
            model's device.

        Raises:
            UsageError: a hidden state, a token or a position that the target does not have.
        """
        self._check(samples, hidden_states)
        cache = self._cache(hidden_states)
        if cache is None:
            return self._compute(samples, hidden_states)
        keys = [key_of(sample) for sample in samples]
        device = self.model.device
        stored = {key: states for key in set(keys) if (states := cache.get(key)) is not None}
        found = {key: (taps.to(device), final.to(device)) for key, (taps, final) in stored.items()}
        missing = [index for index, key in enumerate(keys) if key not in found]
        computed = self._compute([samples[index] for index in missing], hidden_states)
        fresh = {keys[index]: states for index, states in zip(missing, computed, strict=True)}
        cache.put(fresh)
        return [(found | fresh)[key] for key in keys]

    def close(self) -> None:
        """Close the caches; what is in them stays."""
        for cache in self._caches.values():
            cache.close()
        self._caches.clear()

    def _check(self, samples: Sequence[Sample], hidden_states: tuple[int, ...]) -> None:
        layers = self.config.num_hidden_layers
        if not hidden_states or not all(0 <= state <= layers for state in hidden_states):
            raise UsageError(
                f"hidden states {list(hidden_states)}: the target has 0 (embeddings) to {layers}",
                hint="choose others",
            )
        longest, size = self.config.max_position_embeddings, self.config.vocab_size
        for sample in samples:
            if not 0 < len(sample) <= longest:
                raise UsageError(
                    f"sample {escape(sample.id)} has {len(sample)} tokens, the target takes 1 to {longest}",
                    hint="cut the samples",
                )
            if not 0 <= min(sample.tokens) <= max(sample.tokens) < size:
                raise UsageError(
                    f"sample {escape(sample.id)} has token ids outside of the target's vocabulary of {size}",
                    hint="take data that this target's tokenizer made",
                )

    def _cache(self, hidden_states: tuple[int, ...]) -> StateCache | None:
        if self._folder is None:
            return None
        if hidden_states not in self._caches:
            identity = self.config_of_states | {"hidden_states": list(hidden_states)}
            widths = (len(hidden_states) * self.config.hidden_size, self.config.hidden_size)
            self._caches[hidden_states] = StateCache.open(self._folder, identity, widths, self._cache_bytes)
        return self._caches[hidden_states]

    @torch.inference_mode()
    def _compute(self, samples: Sequence[Sample], hidden_states: tuple[int, ...]) -> list[States]:
        """Longest samples first, as many at a time as a step of the engine has tokens."""
        result: dict[int, States] = {}
        order = sorted(range(len(samples)), key=lambda index: -len(samples[index]))
        for group in _groups(order, samples, self.llm.options.max_num_batched_tokens):
            ids = [samples[index].ids for index in group]
            result |= zip(group, states_of(self.model, ids, hidden_states, self._kv_dtype), strict=True)
        return [result[index] for index in range(len(samples))]


def _groups(order: list[int], samples: Sequence[Sample], most: int) -> Iterator[list[int]]:
    """Cut where `most` tokens are reached."""
    group: list[int] = []
    tokens = 0
    for index in order:
        if group and tokens + len(samples[index]) > most:
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += len(samples[index])
    if group:
        yield group


def states_of(
    model: Model, texts: Sequence[Sequence[int]], hidden_states: tuple[int, ...], kv_dtype: torch.dtype
) -> list[States]:
    """One forward pass of whole texts side by side, each with one block of a cache in `kv_dtype`."""
    config, device, lengths = model.config, model.device, [len(text) for text in texts]
    longest = max(lengths)
    shape = CacheShape(
        num_layers=config.num_hidden_layers, num_kv_heads=model.num_kv_heads, head_dim=config.head_dim,
        dtype=kv_dtype, block_size=longest, num_taps=len(hidden_states), hidden_size=config.hidden_size,
        taps_dtype=torch.bfloat16,
    )  # fmt: skip
    cache = KvCache(shape, len(texts), device)
    counts = torch.tensor(lengths, device=device)
    sequence_N = torch.arange(len(texts), device=device).repeat_interleave(counts)
    positions_N = torch.cat([torch.arange(length, device=device) for length in lengths])
    rows = Rows(
        ids_T=torch.tensor([token for text in texts for token in text], device=device),
        positions_T=positions_N,
        slots_T=sequence_N * longest + positions_N,
        block_table_SB=torch.arange(len(texts), dtype=torch.int32, device=device)[:, None],
        sequence_T=sequence_N.to(torch.int32),
        context_T=(positions_N + 1).to(torch.int32),
        tail_TX=None,
    )
    x_ND = model.forward(rows, cache, hidden_states)
    final_ND = model.ops.norm(x_ND, model.norm, config.rms_norm_eps).to(torch.bfloat16)
    assert cache.taps is not None
    taps_NF = cache.taps[rows.slots_T].flatten(1)
    return list(zip(torch.split(taps_NF, lengths), torch.split(final_ND, lengths), strict=True))


def key_of(sample: Sample) -> str:
    """Of its tokens: states depend on nothing else of it."""
    return hashlib.blake2b(sample.tokens.tobytes(), digest_size=16).hexdigest()


def fingerprint_of(
    target: str | Path, *, revision: str | None = None, offline: bool = False, token: str | None = None
) -> str:
    """SHA-256 of a checkpoint's config, headers and samples of its weights; of its tokenizer too."""
    with open_checkpoint(locate(str(target), revision=revision, offline=offline, token=token)) as source:
        identity = source.identity()
        tokenizer = source.folder / "tokenizer.json"
        if tokenizer.is_file():
            identity["tokenizer.json"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
