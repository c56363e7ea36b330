"""What an evaluation is about to do: its drafters, its targets in their modes, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from m27quant.calib.data import parse_dataset
from m27quant.checkpoint.hub import locate
from m27quant.checkpoint.paths import existing
from m27quant.checkpoint.quantized import QuantizedSource, open_checkpoint
from m27quant.drafters.evaluation import EvalOptions
from m27quant.drafters.samples import read_manifest
from m27quant.runtime.speculative.choose import NGRAM
from m27quant.runtime.speculative.load import DrafterOptions, read_drafter


def check_named(
    names: Sequence[str], targets: Sequence[str], dataset: str, options: EvalOptions, located: dict[str, Any]
) -> None:
    """A slip is heard of before a target is loaded."""
    reach = {key: value for key, value in located.items() if key != "revision"}
    for target in targets:
        with open_checkpoint(locate(target, **located)) as source:
            config = source.config
        for name in names:
            if name != NGRAM:
                given = DrafterOptions(tap_offset=options.tap_offset, rope_theta=options.rope_theta)
                read_drafter(locate(name, **reach).folder, config, given)
    folder = existing(dataset)
    if folder is not None and folder.is_dir():
        read_manifest(folder)
    else:
        parse_dataset(dataset)


def many(names: str | Path | Sequence[str | Path]) -> list[str]:
    """One name or several, as text."""
    return [str(name) for name in ([names] if isinstance(names, str | Path) else names)]


def modes_of(
    target: str, activations: Sequence[str], kv_cache_dtypes: Sequence[str], reach: dict[str, Any]
) -> Iterator[tuple[bool, dict[str, Any]]]:
    """(whether its weights are NVFP4, changes of RunOptions) for each way in which a target is to be run."""
    with open_checkpoint(locate(target, **reach)) as source:
        is_quantized = isinstance(source, QuantizedSource)
    if not is_quantized:
        yield False, {}
        return
    for act, kv in product(activations, kv_cache_dtypes):
        yield True, {"activations": act, "kv_cache_dtype": kv}
