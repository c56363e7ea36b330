"""Which instructions the compiled NVFP4 products use: the best that this machine has, or fewer on demand.

`M27QUANT_CPU_LEVEL=portable|avx2|avx512|avx512-bf16` takes another, for tests and for comparing.
"""

from __future__ import annotations

import os

from m27quant.kernels import native

ENVIRONMENT_VARIABLE = "M27QUANT_CPU_LEVEL"

LEVELS = ("portable", "avx2", "avx512", "avx512-bf16")
"""By their numbers in the core; avx512 has VNNI, and each has what those before it have."""


def available() -> tuple[str, ...]:
    """The levels that run on this machine, the best one last; call it only where the core is loaded."""
    return LEVELS[: native.function("m27_nvfp4_level")() + 1]


def level() -> int:
    """The number of the level to use.

    Raises:
        ValueError: `M27QUANT_CPU_LEVEL` names one that this machine does not have.
    """
    wish = os.environ.get(ENVIRONMENT_VARIABLE)
    if not wish:
        return len(available()) - 1
    if wish not in available():
        raise ValueError(f"{ENVIRONMENT_VARIABLE} may be {', '.join(available())} or unset")
    return available().index(wish)


def name() -> str:
    """The level in words, for `m27quant env`."""
    words: bytes = native.function("m27_nvfp4_level_name")(level())
    return words.decode()
