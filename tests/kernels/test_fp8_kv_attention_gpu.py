"""Paged attention in Triton: against F64 in Triton's interpreter and on CUDA; batch invariance bit for bit.

Every slot that no row lists holds NaN.  Shapes: T rows, H query heads, J key/value heads, C head_dim, N keys of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from m27quant.kernels.fp8_kv_attention import reference
from tests.kernels import interpreter
from tests.tolerance import ATTENTION_F32, SQNR_SAME_MATH_DB, relative_error, sqnr_db

pytest.importorskip("triton", reason="needs Triton, which this platform does not have")

from m27quant.kernels.fp8_kv_attention import gpu
from tests.kernels import aot

CHECKS = (
    *("writes", "skips", "lists", "heads", "tails", "long", "magnitudes", "nan"),
    *("tail_or_context", "other_rows", "chunks", "permuted"),
)
FP8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
KINDS = ((BF16, FP8), (BF16, BF16), (F32, FP8), (F32, F32), (F32, BF16))


def check(case: str) -> None:
    with pytest.MonkeyPatch.context() as patches:
        interpreter.poison(patches)
        globals()[f"check_{case}"](torch.device("cpu"))


@dataclass
class Case:
    """Rows and their lists of keys."""

    q: Tensor
    caches: tuple[Tensor, Tensor]
    table: Tensor
    sequence: list[int]
    context: list[int]
    tail: list[list[int]] | None
    k_scale: float = 0.037
    v_scale: float = 0.02

    @classmethod
    def random(
        cls,
        sequence: list[int],
        context: list[int],
        tails: list[int] | None = None,
        *,
        kind: tuple[torch.dtype, torch.dtype] = (BF16, FP8),
        H: int = 6,
        J: int = 1,
        C: int = 32,
        page: int = 16,
        spread: float = 1.0,
    ) -> Case:
        """Tails are of that many slots; they lie behind all blocks of the table."""
        S, B = max(sequence) + 1, -(-max(*context, 1) // page) + 1
        longest = max(tails) if tails else 0
        blocks = S * B + -(-len(sequence) * longest // page) + 1
        table = torch.randperm(S * B).view(S, B)
        free = iter((torch.randperm(len(sequence) * longest) + S * B * page).tolist())
        tail = [[next(free) for _ in range(n)] for n in tails] if tails else None
        used = torch.zeros(blocks * page, dtype=torch.bool)
        for s, n in zip(sequence, context, strict=True):
            used[reference.row_slots(table[s], n, None, page)] = True
        used[[slot for slots in tail or [] for slot in slots]] = True
        q = torch.randn(len(sequence), H, C + 2)[..., :C] * spread
        caches = []
        for magnitude, scale in ((2.0, cls.k_scale), (1.0, cls.v_scale)):
            values = torch.randn(blocks, page, J, C) * magnitude
            values.view(blocks * page, J, C)[~used] = torch.nan
            caches.append(reference.encode(values, torch.tensor(scale), kind[1]))
        return cls(q.to(kind[0]), (caches[0], caches[1]), table, sequence, context, tail)

    def run(self, device: torch.device, rows: list[int] | None = None, *, invariant: bool = False) -> Tensor:
        """The kernel's result for some rows, in that order."""
        rows = list(range(len(self.q))) if rows is None else rows

        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        tail = None
        if self.tail is not None:
            X = max(len(slots) for slots in self.tail) + 1
            tail = torch.full((len(rows), X), -1, dtype=torch.int32, device=device)
            for i, row in enumerate(rows):
                tail[i, : len(self.tail[row])] = integers(self.tail[row])
                tail[i, len(self.tail[row]) + 1 :] = 2**30  # behind the first -1 anything may lie
        result = gpu.attention(
            self.q.to(device)[rows],
            *(cache.to(device) for cache in self.caches),
            self.table.int().to(device),
            integers([self.sequence[row] for row in rows]),
            integers([self.context[row] for row in rows]),
            tail,
            *(torch.tensor(scale, device=device) for scale in (self.k_scale, self.v_scale)),
            self.q.shape[2] ** -0.5,
            invariant=invariant,
        )
        assert (result.shape, result.dtype) == ((len(rows), *self.q.shape[1:]), self.q.dtype)
        return result.cpu()

    def expected(self) -> Tensor:
        """The same in F64."""
        T, H, C = self.q.shape
        page, J = self.caches[0].shape[1:3]
        scales = (self.k_scale, self.v_scale) if self.caches[0].dtype == FP8 else (1.0, 1.0)
        k, v = (
            cache.float().double().flatten(0, 1) * torch.tensor(scale).double()
            for cache, scale in zip(self.caches, scales, strict=True)
        )
        out = torch.zeros(T, H, C, dtype=torch.float64)
        for t in range(T):
            slots = [
                int(self.table[self.sequence[t], i // page]) * page + i % page for i in range(self.context[t])
            ]
            slots += self.tail[t] if self.tail is not None else []
            for h in range(H) if slots else ():
                scores = k[slots, h // (H // J)] @ self.q[t, h].double() * C**-0.5
                out[t, h] = scores.softmax(0) @ v[slots, h // (H // J)]
        return out


def judge(case: Case, device: torch.device) -> None:
    expected = case.expected()
    for invariant in (False, True):
        found = case.run(device, invariant=invariant)
        assert found.isfinite().all()
        if case.q.dtype == BF16:
            assert sqnr_db(expected, found) > SQNR_SAME_MATH_DB
        else:
            assert relative_error(expected, found) < ATTENTION_F32


def check_writes(device: torch.device) -> None:
    """Every BF16 number; ties, saturation and NaN of an FP8 cache; bits as they are where nothing is to be rounded."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(BF16)
    for x, J, C in ((every, 4, 128), (torch.randn(6 * 3 * 20), 3, 20), (every[::97][:600] * 1.7, 3, 20)):
        for cache_dtype in (FP8, BF16, F32):
            k = x.view(-1, J, C)
            v = k.flip(0)
            slots = torch.randperm(len(k) + 5)[: len(k)]
            caches = [torch.zeros(-(-(len(k) + 5) // 8), 8, J, C).to(cache_dtype) for _ in range(4)]
            scales = (torch.tensor(0.37), torch.tensor(2.0**-9))
            reference.write_kv(k, v, caches[0], caches[1], slots, *scales)
            on = [t.to(device) for t in (k, v, caches[2], caches[3], slots, *scales)]
            gpu.write_kv(*on)
            for found, expected in zip(on[2:4], caches[:2], strict=True):
                found, expected = found.cpu().float(), expected.float()
                assert torch.equal(found.isnan(), expected.isnan())
                assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
                assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan())


def check_skips(device: torch.device) -> None:
    cache = torch.zeros(2, 4, 1, 16, dtype=FP8, device=device)
    projected = torch.ones(3, 1, 40, device=device)  # k and v in one
    one = torch.ones((), device=device)
    slots = torch.tensor([-1, 6, -1], device=device)
    gpu.write_kv(projected[..., :16], projected[..., 16:32], cache, cache.clone(), slots, one, one)
    assert cache.float().flatten(0, 1)[:, 0, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]


def check_lists(device: torch.device) -> None:
    """Several sequences in one tile, in any order; a row without keys; every kind of numbers."""
    for kind in KINDS:
        sequence, context = [0, 0, 0, 1, 2, 1, 0, 0, 0], [63, 64, 65, 1, 0, 40, 70, 7, 128]
        judge(Case.random(sequence, context, kind=kind, H=4, J=2, C=24), device)


def check_heads(device: torch.device) -> None:
    """Group sizes and head dimensions, also odd ones; one page of one slot."""
    for H, J, C, page in ((6, 1, 128, 64), (3, 3, 64, 1), (20, 4, 20, 7), (16, 1, 16, 16), (40, 2, 8, 3)):
        judge(Case.random([0, 1], [19, 33], H=H, J=J, C=C, page=page), device)
    judge(Case.random([0] * 20, list(range(1, 21)), H=3, J=1, C=16), device)


def check_tails(device: torch.device) -> None:
    """Tails of all lengths beside rows without one, across the edges of tiles and chunks; a tail without context."""
    sequence = [0, 0, 0, 0, 1, 1, 2, 3]
    context = [61, 61, 61, 61, 253, 256, 0, 64]
    for kind in KINDS[:2]:
        judge(Case.random(sequence, context, [1, 2, 3, 0, 4, 5, 3, 9], kind=kind), device)


def check_long(device: torch.device) -> None:
    """Chunks of a single size and of more than one."""
    judge(Case.random([0], [256 * 18 + 5], C=16, page=64), device)
    judge(Case.random([0, 1], [700, 300], [2, 300], C=16), device)


def check_magnitudes(device: torch.device) -> None:
    """Queries far from 1 keep all their digits in F16."""
    for spread in (0.0, 2.0**-126, 2.0**-30, 2.0**20, 2.0**100):
        case = Case.random([0, 0], [40, 41], spread=spread)
        case.k_scale = min(max(0.037 / spread, 2.0**-120), 2.0**100) if spread else 0.037
        judge(case, device)


def check_nan(device: torch.device) -> None:
    """A NaN in a listed key shows in the rows that list it."""
    for kind in KINDS:
        case = Case.random([0, 1], [9, 40], kind=kind)
        page = case.caches[1].shape[1]
        slot = int(case.table[0, 0])
        case.caches[1].view(torch.uint8).view(-1, page, 32 * case.caches[1].itemsize)[slot, 3] = 0xFF
        for invariant in (False, True):
            found = case.run(device, [1, 0, 1, 1, 0, 1], invariant=invariant)  # six rows share a tile
            assert found[[1, 4]].isnan().all()
            assert found[[0, 2, 3, 5]].isfinite().all()


def check_tail_or_context(device: torch.device) -> None:
    """Drafted keys give the same bits as the same keys once they are committed."""
    for kind in (KINDS[0], KINDS[3]):
        for n, drafted in ((62, 4), (254, 5), (7, 1), (0, 3)) if kind[1] == FP8 else ((30, 4),):
            case = Case.random([0] * 3, [n + drafted] * 3, kind=kind, C=16)
            page = case.caches[0].shape[1]
            committed = case.run(device, invariant=True)
            slots = reference.row_slots(case.table[0], n + drafted, None, page)[n:].tolist()
            for split in {0, 1, drafted}:  # how many of them are in the tail
                case.context = [n + drafted - split] * 3
                case.tail = [slots[drafted - split :], slots[drafted - split :], slots[drafted - split :]]
                assert torch.equal(case.run(device, invariant=True), committed)


def check_other_rows(device: torch.device) -> None:
    """A row alone, in a prefill, among other sequences, in any order: the same bits."""
    for kind in (KINDS[0], KINDS[4]):
        sequence = [0] * 11 + [1, 2, 1]
        context = [*range(58, 69), 90, 5, 12]
        case = Case.random(sequence, context, [0] * 11 + [3, 2, 1], kind=kind, H=4, J=2, C=16)
        together = case.run(device, invariant=True)
        for rows in ([3], [13, 2], torch.randperm(14).tolist(), list(range(0, 14, 2))):
            assert torch.equal(case.run(device, rows, invariant=True), together[rows])


def check_chunks(device: torch.device) -> None:
    """Chunks in programs of their own, joined by a second kernel, or one after the other: the same bits."""
    for kind, keys in ((KINDS[0], 256 * 17 + 9), (KINDS[3], 520)):
        case = Case.random([0, 1], [keys, 300], [3, 2], kind=kind, H=2, C=16, page=64)
        spread = case.run(device, invariant=True)
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(gpu, "PROGRAMS", 0)
            assert torch.equal(case.run(device, invariant=True), spread)


def check_permuted(device: torch.device) -> None:
    """Where the blocks of a sequence lie does not matter."""
    case = Case.random([0, 0], [77, 78])
    first = case.run(device, invariant=True)
    order = torch.randperm(len(case.caches[0]))
    case.caches = tuple(cache.view(torch.uint8)[order].view(cache.dtype) for cache in case.caches)  # type: ignore[assignment]
    case.table = order.argsort()[case.table]
    assert torch.equal(case.run(device, invariant=True), first)


def test_attention_in_the_interpreter() -> None:
    interpreter.run("tests.kernels.test_fp8_kv_attention_gpu", CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_attention_on_cuda(name: str) -> None:
    with interpreter.hardware() as device:
        globals()[f"check_{name}"](device)


def test_chunks_double_in_size_after_every_sixteenth() -> None:
    starts, size = [0], 256
    for chunk in range(100):
        starts.append(starts[-1] + (size << chunk // 16))
    for keys in (1, 255, 256, 257, 4095, 4096, 4097, 4609, 40000, 196608):
        expected = next(n for n, start in enumerate(starts) if start >= keys)
        assert gpu._num_chunks(keys, 256) == expected
    assert gpu._num_chunks(0, 256) == 0


@pytest.mark.gpu
def test_graph_of_real_size() -> None:
    """Captured once, replayed with other lists; verified drafts have the bits of plain decoding."""
    H, J, C, page, blocks = 48, 8, 128, 64, 600
    k, v = (torch.randn(blocks, page, J, C, device="cuda").to(FP8) for _ in range(2))
    table = torch.randperm(blocks, device="cuda").view(2, 300).int()
    q = torch.randn(8, H, C, device="cuda").to(BF16)
    sequence = torch.tensor([0] * 4 + [1] * 4, device="cuda", dtype=torch.int32)
    context = torch.full((8,), 5000, device="cuda", dtype=torch.int32)
    tail = torch.full((8, 5), -1, device="cuda", dtype=torch.int32)
    scale = torch.tensor(0.02, device="cuda")

    def run(context: Tensor, tail: Tensor | None) -> Tensor:
        return gpu.attention(
            q, k, v, table, sequence, context, tail, scale, scale, C**-0.5, invariant=True
        )  # fmt: skip

    run(context, tail)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(context, tail)
    context.fill_(9001)
    for row in range(8):
        for place in range(row % 4 + 1):
            block = table[row // 4, (9001 + place) // page]
            tail[row, place] = block * page + (9001 + place) % page
    graph.replay()
    lengths = context + torch.arange(8, device="cuda", dtype=torch.int32) % 4 + 1
    assert torch.equal(captured, run(lengths, None))


def launch(T: int, S: int, kind: tuple[torch.dtype, torch.dtype], X: int = 0, *, invariant: bool) -> None:
    """M2.7's heads, 16,384 positions."""
    i32 = {"dtype": torch.int32}
    cache = aot.meta(1000, 64, 8, 128, dtype=kind[1])
    tail = aot.meta(T, X, **i32) if X else None
    scale = aot.meta(dtype=F32)
    gpu.attention(
        aot.meta(T, 48, 128, dtype=kind[0]), cache, cache, aot.meta(S, 256, **i32),
        aot.meta(T, **i32), aot.meta(T, **i32), tail, scale, scale, 0.088, invariant=invariant,
    )  # fmt: skip


PREFILL, DECODE, VERIFY = (4096, 1, 0), (32, 32, 0), (64, 8, 16)


@pytest.mark.parametrize(
    ("arch", "kind", "rows", "invariant"),
    [
        (80, KINDS[0], DECODE, False),
        (90, KINDS[0], PREFILL, False),
        pytest.param(90, KINDS[0], DECODE, False, marks=pytest.mark.slow),
        (90, KINDS[0], VERIFY, True),
        pytest.param(90, KINDS[1], PREFILL, True, marks=pytest.mark.slow),
        (100, KINDS[0], PREFILL, False),
        pytest.param(100, KINDS[0], VERIFY, True, marks=pytest.mark.slow),
        pytest.param(120, KINDS[0], PREFILL, False, marks=pytest.mark.slow),
        (120, KINDS[0], DECODE, True),
    ],
)
def test_machine_code(
    arch: int, kind: tuple[torch.dtype, torch.dtype], rows: tuple[int, int, int], invariant: bool
) -> None:
    """Nothing spilled, within the chip's memory; tensor cores in full width where tiles are large enough."""
    with aot.launches(arch) as compiled:
        launch(rows[0], rows[1], kind, rows[2], invariant=invariant)
    for kernel in compiled:
        kernel.check()
    main = compiled[0]
    assert len(compiled) == 1 + main.constants["SPLIT"]
    assert not main.count("tf32")
    wide = {90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}.get(arch)
    if wide and main.constants["BM"] >= 64:
        assert main.count(wide)
    else:
        assert main.count(r"mma\.sync")
    if kind[1] == FP8 and arch >= 89:
        assert main.count(r"cvt\.rn\.f16x2\.e4m3x2")


def test_write_compiles() -> None:
    for arch in (80, 90, 100, 120):
        with aot.launches(arch) as compiled:
            cache = aot.meta(10, 64, 8, 128, dtype=FP8)
            slots, one = aot.meta(7, dtype=torch.int64), aot.meta(dtype=F32)
            gpu.write_kv(aot.meta(7, 8, 128), aot.meta(7, 8, 128), cache, cache, slots, one, one)
        compiled[0].check()
        assert compiled[0].count(r"div\.rn\.f32")
