"""Paged attention on a CPU: against F64, unused slots full of NaN, one row's bits in every batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from m27quant.kernels import native
from m27quant.kernels.fp8_kv_attention import attention
from tests.kernels.paged import Paged, as_tail, paged, some_rows
from tests.kernels.poison import poisoned  # noqa: F401  # a fixture
from tests.tolerance import ATTENTION_F32

pytestmark = pytest.mark.usefixtures("poisoned")

FP8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
DTYPES = list(itertools.product((BF16, F32), (FP8, BF16, F32)))
SHAPES = [
    # J, G, C, block size
    (2, 3, 16, 4), (1, 1, 5, 1), (2, 6, 128, 16), (3, 4, 24, 7), (1, 2, 200, 16), (1, 7, 64, 3),
]  # fmt: skip
EDGES = [1, 3, 63, 64, 65, 130, 1023, 1025, 2100]
"""Lengths around the core's chunks of 64 and spans of 1024 keys."""


@pytest.fixture(params=["core", "reference"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setenv("M27QUANT_KERNELS", "reference")
    elif error := native.load().error:
        pytest.skip(error)
    return str(request.param)


def judge(cache: Paged, q: torch.Tensor, rows: Any) -> torch.Tensor:
    y, expected = cache.attend(q, rows), cache.expected(q, rows)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    values = cache.v_cache.float()
    largest = float(values[values.isfinite()].abs().max()) * (float(cache.v_scale) if values.numel() else 1)
    if cache.v_cache.dtype != FP8:
        largest = float(values[values.isfinite()].abs().max())
    bound = ATTENTION_F32 * largest + (2**-8 * expected.abs() if q.dtype == BF16 else 0)
    assert y.isfinite().all()
    excess = (y.double() - expected).abs() - bound
    assert not (excess > 0).any(), f"missed by {float(excess.max()):g} of {largest:g}"
    return y


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "cache_dtype"), DTYPES)
def test_values(
    shape: tuple[int, int, int, int], dtype: torch.dtype, cache_dtype: torch.dtype, kernels: str
) -> None:
    J, G, C, block_size = shape
    lengths = EDGES if kernels == "core" and C < 100 else EDGES[:6]
    cache = paged(lengths, J=J, C=C, block_size=block_size, dtype=dtype, cache_dtype=cache_dtype)
    rows = some_rows(lengths)
    q = torch.randn(len(rows), J * G, C).to(dtype)
    y = judge(cache, q, rows)
    tails = [as_tail(cache, row, min(row[1], t % 6)) for t, row in enumerate(rows)]
    assert torch.equal(cache.attend(q, tails), y), "context and tail divide the list anyhow"
    for t in range(0, len(rows), 4):
        assert torch.equal(cache.attend(q[t : t + 1], rows[t : t + 1])[0], y[t]), "alone as among others"


@pytest.mark.parametrize("cache_dtype", [FP8, BF16, F32])
def test_a_prefill_in_any_chunks_is_the_same(cache_dtype: torch.dtype, kernels: str) -> None:
    n = 190 if kernels == "core" else 70
    cache = paged([n, 40], J=2, C=32, cache_dtype=cache_dtype)
    rows = [(0, p + 1, ()) for p in range(n)]
    q = torch.randn(n, 12, 32)
    whole = judge(cache, q, rows)
    for cuts in ([0, n], [0, 1, n], [0, 33, 64, 65, n], [*range(0, n, 17), n]):
        parts = [cache.attend(q[a:b], rows[a:b]) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(n)
    assert torch.equal(cache.attend(q[order], [rows[t] for t in order.tolist()]), whole[order])
    other = [(1, 5, ()), *rows, (1, 40, ())]
    mixed = cache.attend(torch.cat((q[:1], q, q[:1])), other)
    assert torch.equal(mixed[1:-1], whole), "beside other sequences"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("committed", [0, 5, 61, 64, 126])
def test_a_tree_of_drafts(committed: int) -> None:
    """Every node sees what it would see if its path had been committed."""
    parents = [-1, 0, 0, 1, 1, 2, -1]
    cache = paged([committed + 1, len(parents)], C=32)
    nodes = cache.slots(1, 0, len(parents))
    paths: list[list[int]] = []
    for parent in parents:
        paths.append([*(paths[parent] if parent >= 0 else []), len(paths)])
    rows = [(0, committed, [nodes[i] for i in path]) for path in paths]
    q = torch.randn(len(rows), 4, 32)
    y = judge(cache, q, rows)
    for t, path in enumerate(paths):
        line = paged([committed + len(path)], C=32)
        own = [*cache.slots(0, 0, committed), *(nodes[i] for i in path)]
        for ours, theirs in ((line.k_cache, cache.k_cache), (line.v_cache, cache.v_cache)):
            ours.flatten(0, 1)[line.slots(0, 0, len(own))] = theirs.flatten(0, 1)[own]
        assert torch.equal(line.attend(q[t : t + 1], [(0, len(own), ())])[0], y[t])


@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize("cache_dtype", [FP8, F32])
def test_threads_do_not_show(T: int, cache_dtype: torch.dtype) -> None:
    """64 threads have less to do than there are: spans are computed apart and joined."""
    cache = paged([3000, 700], J=2, C=32, block_size=16, cache_dtype=cache_dtype)
    rows = [(t % 2, (3000, 700)[t % 2] - t, ()) for t in range(T)]
    rows[0] = as_tail(cache, rows[0], 3)
    q = torch.randn(T, 6, 32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 64):
        torch.set_num_threads(threads)
        found.append(cache.attend(q, rows))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("cache_dtype", [FP8, BF16, F32])
def test_every_slot_that_no_row_lists_may_hold_anything(cache_dtype: torch.dtype) -> None:
    """A row's own later keys, other rows' keys and free slots: NaN there shows nowhere."""
    cache = paged([100], C=16, cache_dtype=cache_dtype)
    q = torch.randn(3, 4, 16)
    rows = [(0, 37, ()), (0, 64, ()), (0, 36, cache.slots(0, 36, 37))]
    y = judge(cache, q, rows)
    for stores in (cache.k_cache, cache.v_cache):
        stores.flatten(0, 1)[cache.slots(0, 64, 100)] = torch.full((36, 2, 16), torch.nan).to(cache_dtype)
    assert torch.equal(cache.attend(q, rows), y)
    for stores in (cache.k_cache, cache.v_cache):
        stores.flatten(0, 1)[cache.slots(0, 37, 64)] = torch.full((27, 2, 16), torch.nan).to(cache_dtype)
    later = cache.attend(q, rows)
    assert torch.equal(later[[0, 2]], y[[0, 2]]), "rows that share keys with a row whose later keys are NaN"
    assert later[1].isnan().all()


@pytest.mark.usefixtures("kernels")
def test_keys_without_weight_and_one_key() -> None:
    cache = paged([70], C=16)
    slots = cache.slots(0, 0, 70)
    q = torch.zeros(1, 2, 16)
    q[..., 0] = 100.0
    keys = torch.full((70, 2, 16), -100.0)
    keys[41] = 100.0
    cache.k_cache.flatten(0, 1)[slots] = keys
    y = cache.attend(q, [(0, 70, ())])
    assert torch.equal(y[0], cache.v_cache.flatten(0, 1)[slots[41]]), "all others have weight exp(-50000)"
    assert torch.equal(cache.attend(q, [(0, 1, ())])[0], cache.v_cache.flatten(0, 1)[slots[0]])
    assert torch.equal(cache.attend(q, [(0, 0, ())]), torch.zeros(1, 2, 16))
    cache.k_cache.flatten(0, 1)[slots] = torch.zeros(70, 2, 16)
    mean = cache.v_cache.flatten(0, 1)[slots].double().mean(0)
    assert (cache.attend(q, [(0, 70, ())])[0] - mean).abs().max() < 1e-6, "equal weights"


@pytest.mark.usefixtures("kernels")
def test_infinite_scores_are_as_in_softmax() -> None:
    cache = paged([130], C=16)
    slots = cache.slots(0, 0, 130)
    q = torch.full((1, 2, 16), 1e30)
    keys = torch.zeros(130, 2, 16)
    keys[:64] = -1e30  # a whole chunk of -inf
    cache.k_cache.flatten(0, 1)[slots] = keys
    mean = cache.v_cache.flatten(0, 1)[slots[64:]].double().mean(0)
    assert (cache.attend(q, [(0, 130, ())])[0] - mean).abs().max() < 1e-6
    assert cache.attend(q, [(0, 64, ())]).isnan().all(), "-inf alone"
    cache.k_cache.flatten(0, 1)[slots[100]] = 1e30
    assert cache.attend(q, [(0, 130, ())]).isnan().all()
    q[:] = torch.nan
    assert cache.attend(q, [(0, 130, ())]).isnan().all()


@pytest.mark.usefixtures("kernels")
def test_64_bit_indices_and_strided_queries() -> None:
    cache = paged([30], C=16)
    q = torch.randn(2, 4, 40)[..., 3:19]
    rows = [(0, 20, cache.slots(0, 20, 23)), (0, 30, ())]
    y = judge(cache, q, rows)
    tail = torch.tensor([rows[0][2], [-1, 0, 0]])
    found = attention(
        q, cache.k_cache, cache.v_cache, cache.table.long(), torch.tensor([0, 0]), torch.tensor([20, 30]), tail,
        cache.k_scale, cache.v_scale, softmax_scale=0.25,
    )  # fmt: skip
    assert torch.equal(found, y), "a tail ends at its first -1"


@pytest.mark.usefixtures("kernels")
def test_no_rows() -> None:
    cache = paged([30], C=16)
    none = torch.empty(0, dtype=torch.int32)
    y = attention(
        torch.empty(0, 4, 16), cache.k_cache, cache.v_cache, cache.table, none, none, None,
        cache.k_scale, cache.v_scale, softmax_scale=0.25,
    )  # fmt: skip
    assert y.shape == (0, 4, 16)


@pytest.mark.usefixtures("kernels")
def test_lists_that_point_nowhere_are_refused() -> None:
    cache = paged([30], C=16)
    q = torch.zeros(1, 4, 16)
    for row, message in (
        ((1, 5, ()), "sequence holds 1"),
        ((-1, 5, ()), "sequence holds -1"),
        ((0, -1, ()), "context holds -1"),
        ((0, 41, ()), "context holds 41"),
        ((0, 40, ()), "block_table holds -7777"),
        ((0, 5, (44,)), "tail holds 44"),
        ((0, 5, (-2,)), "tail holds -2"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.attend(q, [row])


def test_tensors_that_do_not_fit_are_refused() -> None:
    cache = paged([30], C=16)
    good: dict[str, Any] = {
        "q_THC": torch.zeros(1, 4, 16), "k_cache": cache.k_cache, "v_cache": cache.v_cache,
        "block_table_SB": cache.table, "sequence_T": torch.zeros(1, dtype=torch.int32),
        "context_T": torch.ones(1, dtype=torch.int32), "tail_TX": None,
        "k_scale": cache.k_scale, "v_scale": cache.v_scale,
    }  # fmt: skip
    attention(**good, softmax_scale=1.0)
    for change, message in (
        ({"q_THC": torch.zeros(1, 3, 16)}, "a multiple of 2"),
        ({"q_THC": torch.zeros(1, 4, 8)}, "heads of 16"),
        ({"q_THC": torch.zeros(1, 4, 16).half()}, "q must be BF16 or F32"),
        ({"k_cache": cache.k_cache.half()}, "k_cache must be contiguous"),
        ({"k_cache": cache.k_cache.bfloat16()}, "differ"),
        ({"context_T": torch.ones(2, dtype=torch.int32)}, "context must be"),
        ({"sequence_T": torch.ones(1)}, "sequence must be"),
        ({"tail_TX": torch.ones(2, 3, dtype=torch.int32)}, "tail must be"),
        ({"k_scale": torch.tensor(0.0)}, "k_scale must be positive"),
        ({"v_scale": torch.ones(1)}, "v_scale must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(**(good | change), softmax_scale=1.0)
