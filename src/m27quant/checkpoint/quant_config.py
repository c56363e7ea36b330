"""The quantization sections that engines read: config.json's `quantization_config` and hf_quant_config.json.

Keys, their order and the exclude rule are those of nvidia-modelopt 0.47, which vLLM and SGLang load.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any, Literal

from m27quant.checkpoint.config import GROUP_SIZE

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Format and version that the files follow; vLLM accepts no other producer name.  The card says who wrote them."""

KvCache = Literal["fp8", "fp8_cast"] | None


def exclude_modules(quantized: Iterable[str], unquantized: Iterable[str]) -> list[str]:
    """The exclude list for modules left alone, as modelopt computes it.

    For each module the shortest prefix that matches no quantized module stands for all behind it
    (`prefix*`, or `prefix.*` where only that is safe); a module without such a prefix is listed by name.
    For M2.7's 62 layers these are NVIDIA's 125 entries.
    """
    taken = sorted(quantized)

    def is_free(prefix: str) -> bool:
        at = bisect_left(taken, prefix)
        return at == len(taken) or not taken[at].startswith(prefix)

    return sorted({_pattern(module.split("."), is_free) for module in unquantized})


def _pattern(parts: list[str], is_free: Any) -> str:
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length])
        if is_free(prefix):
            return prefix + "*"
        if is_free(prefix + "."):
            return prefix + ".*"
    return ".".join(parts)


def hf_quant_config(exclude: list[str], kv_cache: KvCache) -> dict[str, Any]:
    """The object of hf_quant_config.json."""
    return {
        "producer": dict(PRODUCER),
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8" if kv_cache else None,
            "group_size": GROUP_SIZE,
            "exclude_modules": exclude,
        },
    }


def quantization_config(exclude: list[str], kv_cache: KvCache) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    values = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP_SIZE}
    section: dict[str, Any] = {
        "config_groups": {
            "group_0": {"input_activations": values, "weights": dict(values), "targets": ["Linear"]}
        },
        "ignore": exclude,
        "quant_algo": "NVFP4",
    }
    if kv_cache:
        # without "dynamic": false vLLM silently keeps a BF16 cache
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return section | {"producer": dict(PRODUCER), "quant_method": "modelopt"}


def output_config(raw: dict[str, Any], section: dict[str, Any], *, keep_auto_map: bool) -> dict[str, Any]:
    """The output's config.json: the source's, with only `quantization_config` replaced (as the last key).

    `auto_map` stays only where the code files that it names come along.
    """
    dropped = {"quantization_config"} | (set() if keep_auto_map else {"auto_map"})
    return {key: value for key, value in raw.items() if key not in dropped} | {"quantization_config": section}
