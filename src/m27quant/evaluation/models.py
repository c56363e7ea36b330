"""What is evaluated: a reference and candidates, opened and checked before anything is computed, and their modes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.layout import check_layout
from m27quant.checkpoint.quantized import QuantizedSource, open_checkpoint, same_model
from m27quant.checkpoint.source import Source
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.runtime.streamed import Precision

ACTIVATIONS = ("auto", "nvfp4", "bf16")
KV_CACHES = ("auto", "fp8", "bf16")


@dataclass(frozen=True, slots=True)
class Model:
    """One checkpoint, and each precision in which it is run."""

    name: str
    """As the user named it."""
    source: Source
    precisions: tuple[Precision, ...]

    @property
    def is_quantized(self) -> bool:
        """Its experts are NVFP4."""
        return isinstance(self.source, QuantizedSource)


@contextmanager
def speaking_of(name: str) -> Iterator[None]:
    """Say of a fault which of several checkpoints it is in."""
    try:
        yield
    except CheckpointError as fault:
        raise CheckpointError(f"{escape(name)}: {fault.message}", hint=fault.hint) from None


def open_reference(name: str, location: Location) -> Model:
    """The model that candidates are compared with: nothing but its weights is rounded.

    Raises:
        CheckpointError: files that are damaged, or tensors that do not fit config.json.
    """
    with speaking_of(name):
        source = open_checkpoint(location)
        if isinstance(source, QuantizedSource):
            source.check_layout(input_scales=False)
        else:
            check_layout(source)
    return Model(name, source, (Precision(),))


def open_candidate(
    name: str,
    location: Location,
    reference: Model,
    activations: Sequence[str],
    kv_cache_dtypes: Sequence[str],
) -> Model:
    """A candidate in each mode.

    Args:
        name: as the user named it.
        location: where it is.
        reference: what it is compared with.
        activations: nvfp4, bf16, or auto: nvfp4 where there are input scales.  Inputs of experts that are not NVFP4 are
            never rounded.
        kv_cache_dtypes: fp8, bf16, or auto: what config.json declares.  Each goes with each of `activations`.

    Raises:
        UsageError: a mode that there is not.
        CheckpointError: damaged files, or a checkpoint of another model.
    """
    for what, known, asked in (
        ("activations", ACTIVATIONS, activations),
        ("kv_cache_dtype", KV_CACHES, kv_cache_dtypes),
    ):
        for mode in asked:
            if mode not in known:
                raise UsageError(f"{what} {escape(mode)} is none of {', '.join(known)}")
    with speaking_of(name):
        source = open_checkpoint(location)
        same_model(source.config, reference.source.config)
        if not isinstance(source, QuantizedSource):
            check_layout(source)
            return Model(name, source, _precisions(["bf16"], kv_cache_dtypes, "bf16", "bf16"))
        precisions = _precisions(
            activations,
            kv_cache_dtypes,
            "nvfp4" if source.has_input_scales else "bf16",
            "fp8" if source.declares_fp8_kv else "bf16",
        )
        source.check_layout(input_scales=any(p.activations == "nvfp4" for p in precisions))
    return Model(name, source, precisions)


def _precisions(
    activations: Sequence[str], kv_caches: Sequence[str], usual: str, usual_kv: str
) -> tuple[Precision, ...]:
    """All combinations, each once, in the order in which they were asked for."""
    chosen = (
        (usual if act == "auto" else act, usual_kv if kv == "auto" else kv)
        for act, kv in product(activations, kv_caches)
    )
    return tuple(Precision(act, kv) for act, kv in dict.fromkeys(chosen))  # type: ignore[arg-type]  # checked by name


def labels(candidates: Sequence[Model]) -> list[str]:
    """One for each candidate and precision: the folder's name where no other candidate has it, and the mode."""
    short = [model.name.rstrip("/").rpartition("/")[2] or model.name for model in candidates]
    named = [
        own if short.count(own) == 1 else model.name for own, model in zip(short, candidates, strict=True)
    ]
    several = any(len(model.precisions) > 1 for model in candidates)
    return [
        f"{own} ({p.activations}, {p.kv_cache})" if several else own
        for own, model in zip(named, candidates, strict=True)
        for p in model.precisions
    ]
