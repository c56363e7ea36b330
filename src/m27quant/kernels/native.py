"""The compiled CPU core: found, checked and loaded once, and its work spread over threads.

A machine without it runs the torch reference, and `load().error` says why.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

_T = TypeVar("_T")

ABI = 5
"""`M27_ABI` of `_native/core.h`: a core built from other sources than these is not used."""

FOLDER = Path(__file__).parent / "_native"

_thread = threading.local()

_BYTES_PER_THREAD = 1 << 20  # waking a thread costs as much as some hundred KB of work

_FP8 = [c_void_p, c_void_p, c_int64, c_int64, c_int64]  # weight, scale_inv, K, rows and columns of a block
_ROWS = [c_int64, c_int64]  # first row, row after the last
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "m27_abi": (c_int, []),
    "m27_isa": (c_char_p, []),
    "m27_dequantize": (None, [*_FP8, c_void_p, c_void_p, *_ROWS]),
    "m27_amax_fp8": (c_float, [*_FP8, *_ROWS]),
    "m27_amax_bf16": (c_float, [c_void_p, c_int64, *_ROWS]),
    "m27_pack_fp8": (c_int, [*_FP8, c_float, c_void_p, c_void_p, *_ROWS]),
    "m27_pack_bf16": (c_int, [c_void_p, c_int64, c_float, c_void_p, c_void_p, *_ROWS]),
    "m27_search_fp8": (c_int, [*_FP8, c_float, c_void_p, c_void_p, c_void_p, *_ROWS]),
    "m27_search_bf16": (c_int, [c_void_p, c_int64, c_float, c_void_p, c_void_p, c_void_p, *_ROWS]),
    "m27_arrange": (None, [c_void_p, c_void_p, c_double, c_void_p, c_int64]),
    "m27_couplings": (None, [c_void_p, c_int64, c_void_p]),
    "m27_cholesky": (c_int, [c_void_p, c_int64, c_double]),
    "m27_gptq_pack": (c_int, [c_void_p, c_int64, c_float, *[c_void_p] * 5, *_ROWS]),
    "m27_gptq_energy": (c_int, [c_void_p, c_int64, *[c_void_p] * 4, *_ROWS]),
    "m27_count_fp8": (None, [*_FP8, c_float, c_void_p, *_ROWS]),
    "m27_count_bf16": (None, [c_void_p, c_int64, c_float, c_void_p, *_ROWS]),
    "m27_row_errors": (None, [c_void_p, c_int64, c_float, c_void_p, c_void_p, c_void_p, c_void_p, *_ROWS]),
    "m27_compare_fp8": (c_float, [*_FP8, c_float, c_void_p, c_void_p, c_void_p, c_void_p, *_ROWS]),
    "m27_count_codes": (None, [c_void_p, c_int64, c_void_p]),
    "m27_column_energy": (None, [c_void_p, c_int64, c_int64, c_void_p, c_void_p]),
    "m27_nonfinite16": (c_int, [c_void_p, c_int64, c_int]),
    "m27_nonfinite32": (c_int, [c_void_p, c_int64, c_int]),
    "m27_linear_rows": (None, [c_void_p, c_int, *[c_int64] * 3, c_int, c_int64, c_void_p]),
    "m27_linear": (
        None,
        [c_int, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int, *[c_int64] * 3, *_ROWS],
    ),
    "m27_norm_rope": (
        None,
        [
            *(c_void_p, c_int, c_int64, c_int64, c_void_p, c_int, c_float),
            *(c_void_p, c_void_p, *[c_int64] * 3, c_void_p, *_ROWS),
        ],
    ),
    "m27_router_select": (None, [c_void_p, c_void_p, c_int64, c_int64, *[c_void_p] * 3, *_ROWS]),
    "m27_write_kv": (
        None,
        [c_void_p, c_int, c_int64, c_int64, c_void_p, c_int, c_float, c_void_p, *_ROWS],
    ),
    "m27_attention_plan": (c_int64, [*[c_void_p] * 4, *[c_int64] * 7, c_void_p, c_void_p]),
    "m27_attention": (
        c_int,
        [
            *(c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_int, *[c_void_p] * 5, *[c_int64] * 7),
            *(c_float, c_float, c_int64, c_int64, c_void_p, c_int, *_ROWS),
        ],
    ),
    "m27_nvfp4_level": (c_int, []),
    "m27_nvfp4_level_name": (c_char_p, [c_int]),
    "m27_nvfp4_quantize": (None, [c_void_p, c_int, c_int64, c_float, c_int, c_void_p, c_void_p, *_ROWS]),
    "m27_advise_large_pages": (None, [c_void_p, c_int64]),
    "m27_nvfp4_prepare": (None, [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, *_ROWS]),
    "m27_nvfp4_unpack": (None, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, *_ROWS]),
    "m27_nvfp4_panel_bytes": (c_int64, [c_int, c_int, c_int, c_int64]),
    "m27_nvfp4_gemm": (None, [c_int, c_void_p, c_int, *[c_int64] * 3, *[c_void_p] * 8]),
    "m27_nvfp4_moe_words": (c_int64, [c_int64, c_int64]),
    "m27_nvfp4_moe": (None, [c_int, c_void_p, c_int, *[c_int64] * 6, *[c_void_p] * 17]),
}


class Library(NamedTuple):
    """The loaded core, or the reason why there is none."""

    handle: ctypes.CDLL | None
    isa: str
    """The instruction set level that runs here, in words."""
    error: str | None


@cache
def load() -> Library:
    """Load the compiled core, once."""
    found = sorted(path for suffix in ("so", "dylib", "pyd") for path in FOLDER.glob(f"core*.{suffix}"))
    if not found:
        return _absent("the compiled core was not built: it needs a C compiler at install time")
    try:
        handle = ctypes.CDLL(str(found[0]))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return _absent(f"the compiled core cannot be loaded: {error}")
    if handle.m27_abi() != ABI:
        return _absent(f"the compiled core has version {handle.m27_abi()}, not {ABI}: install again")
    return Library(handle, handle.m27_isa().decode(), None)


def function(name: str) -> Callable[..., Any]:
    """An entry point of the core; call it only where `load().error` is None."""
    handle = load().handle
    if handle is None:
        raise RuntimeError(load().error)
    entry: Callable[..., Any] = getattr(handle, name)
    return entry


def over_rows(call: Callable[[int, int], _T], num_rows: int, step: int, row_bytes: int) -> list[_T]:
    """`call(first, end)` on ranges of rows that are cut at multiples of `step`, on torch's number of threads.

    The core computes every row from its own block alone, so the cut cannot change a byte.  ctypes lets
    go of the interpreter lock during a call.
    """
    steps = -(-num_rows // step)
    threads = 1 if getattr(_thread, "alone", False) else torch.get_num_threads()
    parts = max(min(threads, steps, num_rows * row_bytes // _BYTES_PER_THREAD + 1), 1)
    cuts = [min(steps * part // parts * step, num_rows) for part in range(parts + 1)]
    if parts == 1:
        return [call(0, num_rows)]
    pool = _pool(os.getpid(), parts)
    futures = [pool.submit(call, first, end) for first, end in pairwise(cuts)]
    try:
        return [future.result() for future in futures]
    finally:
        wait(futures)  # after Ctrl-C too: the threads write to tensors that the caller is about to free


def together(call: Callable[[], object], num_bytes: int) -> None:
    """`call()` on as many of torch's threads as reading `num_bytes` is worth, this one among them.

    For functions of the core that share their work among all who call them: one that comes late finds
    less to do, and none is needed but the first.
    """
    helpers = min(torch.get_num_threads(), num_bytes // _BYTES_PER_THREAD + 1) - 1
    if helpers < 1:
        call()
        return
    pool = _pool(os.getpid(), helpers + 1)
    futures = [pool.submit(call) for _ in range(helpers)]
    try:
        call()
    finally:
        wait([future for future in futures if not future.cancel()])  # one that has not begun is not needed


@contextmanager
def one_thread() -> Iterator[None]:
    """Calls of this thread stay in it: its caller has as many threads at work as there are cores."""
    before = getattr(_thread, "alone", False)
    _thread.alone = True
    try:
        yield
    finally:
        _thread.alone = before


def _absent(reason: str) -> Library:
    return Library(None, "", reason)


@cache
def _pool(_process: int, num_threads: int) -> ThreadPoolExecutor:
    """Threads of this process (a forked child has none of its parent's)."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="m27-kernel")
