"""DFlash in training: the runtime's forward, the loss and all gradients derived a second time, what each slot sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.drafters import attention
from m27quant.drafters.batch import Batch, LossReport
from m27quant.drafters.dflash import DFlashSpec, block_hidden, dflash_loss, init_dflash, sample_anchors
from m27quant.runtime.speculative.config import LayerAttention
from m27quant.runtime.speculative.dflash import DFlashDrafter
from m27quant.runtime.speculative.load import load_drafter
from m27quant.runtime.speculative.proposal import DraftRequest
from tests.drafters import making
from tests.runtime.speculative import makers as m
from tests.runtime.speculative import rederived as r
from tests.tolerance import DRAFTER_ATOL, F64, GRADIENT_BF16_DB, TRAINING_F64, sqnr_db

ANCHORS = torch.tensor([[0, 3, 11, 17], [1, 2, 9, 19], [0, 4, 5, 0]])
LENGTHS = (24, 24, 7)
VALID = torch.tensor([[True] * 4, [True] * 4, [True, True, True, False]])
WEIGHTS = 0.85 ** torch.arange(3)


SLIDING, FULL = "sliding_attention", "full_attention"
SHAPES: list[dict[str, Any]] = [
    {"block": 2, "layers": 1, "taps": (3,)},
    {"block": 16, "layers": 3, "taps": (1, 2, 4, 6, 8), "heads": 6, "kv_heads": 1, "head_dim": 4},
    {"layer_types": [SLIDING, FULL], "sliding_window": 6},
    {"layer_types": [SLIDING, SLIDING], "sliding_window": 3, "is_causal": False},
    {"speculators": 5},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: " ".join(f"{k} {v}" for k, v in s.items()))
@pytest.mark.parametrize("scores", [1, 2**20], ids=["one group a piece", "one piece"])
def test_the_forward_pass_is_the_runtimes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], scores: int
) -> None:
    monkeypatch.setitem(attention.SCORES_AT_ONCE, "cpu", scores)
    if "speculators" in shape:
        types = {"layer_types": [SLIDING, FULL], "sliding_window": shape["speculators"]}
        config, tensors = m.dflash_speculators(**types)
    else:
        config, tensors = m.dflash(**shape)
    m.write(tmp_path, config, tensors)
    drafter = load_drafter(tmp_path, m.TARGET, making.EMBED, making.HEAD, dtype=torch.float32).drafter
    assert isinstance(drafter, DFlashDrafter)
    spec = making.dflash_spec(config, attention=drafter.settings.attention)
    batch = making.batch(LENGTHS, tensors["fc.weight"].shape[1], dtype=torch.float32)
    found = block_hidden(tensors, spec, batch, ANCHORS, making.shared(torch.float32), spec.block_size)
    for b, anchors in enumerate(ANCHORS.tolist()):
        ids = batch.ids_BT[b].tolist()
        requests = [DraftRequest(t, ids[: t + 1], batch.taps_BTF[b, :t], 99) for t in set(anchors)]
        drafter.propose(requests)
        with torch.inference_mode():
            expected = drafter.block_hidden([(t, ids[t]) for t in anchors])
        torch.testing.assert_close(found[b], expected, atol=DRAFTER_ATOL, rtol=0)
        for t in set(anchors):
            drafter.forget(t)


def derived(
    config: dict[str, Any], params: m.Tensors, batch: Batch, soft: float, K: int
) -> tuple[Tensor, dict[str, list[float]]]:
    """The loss and the sums of its report, a block and a slot at a time."""
    heads, embed, head = making.heads(config), making.EMBED.double(), making.HEAD.double()
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    sums = {name: [0.0] * (K - 1) for name in ("losses", "hits", "chains", "counts")}
    for b in range(len(LENGTHS)):
        for a, valid in zip(ANCHORS[b].tolist(), VALID[b].tolist(), strict=True):
            if not valid:
                continue
            taps, first = batch.taps_BTF[b, :a], int(batch.ids_BT[b, a])
            block = r.dflash_block(config, params, embed, taps, first, K, m.VOCAB - 1, heads)
            chain = True
            for k in range(1, K):
                if a + k >= LENGTHS[b] or not batch.loss_mask_BT[b, a + k]:
                    break
                logits, token = head @ block[k], int(batch.ids_BT[b, a + k])
                loss = making.cross_entropy(logits, token, head @ batch.final_BTD[b, a + k - 1], soft)
                total, weight = total + float(WEIGHTS[k - 1]) * loss, weight + float(WEIGHTS[k - 1])
                hit = int(logits.argmax()) == token
                chain = chain and hit
                for name, value in zip(sums, (float(loss.detach()), hit, chain, 1), strict=True):
                    sums[name][k - 1] += value
    return total / weight, sums


@pytest.mark.parametrize("soft", [0.0, 0.4, 1.0])
def test_loss_and_gradients_are_the_formulas(soft: float) -> None:
    config, tensors = m.dflash(layers=2, block=4)
    batch, params = making.batch(LENGTHS, 3 * m.D), making.wanting(tensors)
    batch.ids_BT[0, 4] = m.VOCAB - 2
    batch.loss_mask_BT[1, 11] = False  # another's turn within a block
    expected, sums = derived(config, params, batch, soft, 4)
    report = dflash_loss(
        params, making.dflash_spec(config), batch, (ANCHORS, VALID), making.shared(), slot_weights_K1=WEIGHTS, soft=soft
    )  # fmt: skip
    assert abs(float((report.loss - expected).detach())) < TRAINING_F64
    for name, values in sums.items():
        found = getattr(report, f"{name}_P")
        torch.testing.assert_close(
            found, torch.tensor(values, dtype=torch.float64), atol=TRAINING_F64, rtol=0
        )
    assert torch.equal(report.tries_P, report.counts_P)
    grads = zip(
        *(torch.autograd.grad(x, list(params.values())) for x in (report.loss, expected)), strict=True
    )
    for name, (ours, theirs) in zip(params, grads, strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(
            ours, theirs, atol=TRAINING_F64, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_hits_are_counted() -> None:
    """Text that is the drafter's own choice: all chains are whole until one token is made another."""
    config, tensors = m.dflash(block=4)
    spec, batch = making.dflash_spec(config), making.batch((24,), 3 * m.D)
    params, anchors = {n: t.double() for n, t in tensors.items()}, torch.tensor([[2, 10]])
    hidden = block_hidden(params, spec, batch, anchors, making.shared(), 4)
    for a in (0, 1):
        start = int(anchors[0, a])
        batch.ids_BT[0, start + 1 : start + 4] = (hidden[0, a, 1:] @ making.HEAD.double().T).argmax(-1)
    given = (anchors, torch.ones_like(anchors, dtype=torch.bool))

    def rates(of: Batch) -> tuple[list[float], list[float]]:
        report = dflash_loss(params, spec, of, given, making.shared(), slot_weights_K1=WEIGHTS, soft=0.0)
        return report.accuracy.tolist(), report.chain_rate.tolist()

    assert rates(batch) == ([1, 1, 1], [1, 1, 1])
    assert rates(making.changed(batch, "ids_BT", 0, 11)) == ([0.5, 1, 1], [0.5, 0.5, 0.5])


# -- what is seen ----------------------------------------------------------------------------------

PERTURBED = torch.tensor([[6, 14]])
RULES = {
    "full": LayerAttention(None, False, False),
    "causal": LayerAttention(None, True, False),
    "window": LayerAttention(4, False, False),
    "window from anchor": LayerAttention(4, True, True),
}


def block_of(spec: DFlashSpec, params: m.Tensors, batch: Batch) -> Tensor:
    return block_hidden(params, spec, batch, PERTURBED, making.shared(torch.float32), 4)[0]


@pytest.mark.parametrize(("rule", "scores"), [*((rule, 2**20) for rule in RULES), ("window", 1)])
def test_a_block_sees_the_features_before_its_anchor_and_no_others(
    monkeypatch: pytest.MonkeyPatch, rule: str, scores: int
) -> None:
    """One layer, in which a slot reads features directly; every position in turn."""
    monkeypatch.setitem(attention.SCORES_AT_ONCE, "cpu", scores)
    config, tensors = m.dflash(layers=1, block=4)
    spec, batch = (
        making.dflash_spec(config, attention=(RULES[rule],)),
        making.batch((24,), 3 * m.D, dtype=torch.float32),
    )
    before = block_of(spec, tensors, batch)
    for t in range(24):
        after = block_of(spec, tensors, making.changed(batch, "taps_BTF", 0, t))
        for a, anchor in enumerate(PERTURBED[0].tolist()):
            for k in range(4):
                back = {"full": anchor, "causal": anchor, "window": 3 - k, "window from anchor": 4}[rule]
                seen = anchor - back <= t < anchor
                assert torch.equal(before[a, k], after[a, k]) != seen, (t, anchor, k)


def test_of_tokens_a_block_sees_its_anchors_alone() -> None:
    config, tensors = m.dflash(layers=2, block=4)
    spec, batch = making.dflash_spec(config), making.batch((24,), 3 * m.D, dtype=torch.float32)
    before = block_of(spec, tensors, batch)
    for t in range(24):
        after = block_of(spec, tensors, making.changed(batch, "ids_BT", 0, t))
        for a, anchor in enumerate(PERTURBED[0].tolist()):
            for k in range(4):
                assert torch.equal(before[a, k], after[a, k]) != (t == anchor), (t, anchor, k)


@pytest.mark.parametrize(("rule", "sees"), [("full", True), ("causal", False)])
def test_slots_of_a_block_see_those_behind_them_unless_causal(rule: str, sees: bool) -> None:
    config, tensors = m.dflash(layers=1, block=4)
    spec = making.dflash_spec(config, attention=(RULES[rule],))
    batch, shared = making.batch((24,), 3 * m.D, dtype=torch.float32), making.shared(torch.float32)
    fewer, more = (block_hidden(tensors, spec, batch, PERTURBED, shared, size) for size in (3, 4))
    difference = float((fewer - more[:, :, :3]).abs().max())
    assert difference > 1e-2 if sees else difference < DRAFTER_ATOL


def run(
    batch: Batch, anchors: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float64
) -> tuple[LossReport, Tensor]:
    """The loss and its gradient, one vector."""
    config, tensors = m.dflash(block=4)
    params = making.wanting(tensors, dtype)
    report = dflash_loss(
        params, making.dflash_spec(config), batch, anchors, making.shared(dtype), slot_weights_K1=WEIGHTS, soft=0.4
    )  # fmt: skip
    grads = torch.autograd.grad(report.loss, list(params.values()))
    return report, torch.cat([g.flatten().double() for g in grads])


def test_padding_never_counts() -> None:
    batch = making.batch(LENGTHS, 3 * m.D)
    (before, grad), (after, more) = (
        run(batch, (ANCHORS, VALID)),
        run(making.padded(batch, 5), (ANCHORS, VALID)),
    )
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.counts_P, after.counts_P)
    assert torch.equal(grad, more)


def test_parts_of_a_batch_add_up_to_it() -> None:
    batch = making.batch(LENGTHS, 3 * m.D)
    whole, grad = run(batch, (ANCHORS, VALID))
    parts = []
    for rows in (slice(0, 1), slice(1, 3)):
        part = Batch(*(getattr(batch, name)[rows] for name in Batch.__slots__))
        parts.append(run(part, (ANCHORS[rows], VALID[rows])))
    total = parts[0][0] + parts[1][0]
    for name in ("loss", "weight", "losses_P", "hits_P", "chains_P", "counts_P"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name), atol=F64, rtol=0)
    weighted = sum((part.weight * g for part, g in parts), torch.zeros(())) / whole.weight
    torch.testing.assert_close(weighted, grad, atol=F64, rtol=0)


def test_nothing_to_learn_is_a_loss_of_zero() -> None:
    batch = making.batch((5, 3), 3 * m.D)
    batch.loss_mask_BT[:] = False
    report, grad = run(batch, sample_anchors(batch, 4, [torch.Generator(), torch.Generator()]))
    assert float(report.loss.detach()) == float(report.weight) == 0
    assert report.chain_rate.tolist() == [0, 0, 0]
    assert not grad.any()


def test_a_step_in_bf16_points_where_the_one_in_f64_does() -> None:
    exact, rounded = (
        run(making.batch(LENGTHS, 3 * m.D, dtype=dtype), (ANCHORS, VALID), dtype)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert rounded[0].loss.dtype == torch.float32
    assert sqnr_db(exact[1], rounded[1]) > GRADIENT_BF16_DB


# -- anchors and first weights ---------------------------------------------------------------------


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_anchors_are_followed_by_what_the_target_wrote() -> None:
    batch = making.batch((20, 12, 3), 3, prompts=(6, 9, 3))
    batch.loss_mask_BT[0, 10:13] = False
    allowed = [[5, 6, 7, 8, *range(12, 19)], [8, 9, 10], []]
    anchors, valid = sample_anchors(batch, 50, seeded(1, 2, 3))
    assert anchors.shape == (3, 11)
    assert [row[ok].tolist() for row, ok in zip(anchors, valid, strict=True)] == allowed
    reached: list[set[int]] = [set(), set(), set()]
    for seed in range(60):
        anchors, valid = sample_anchors(batch, 2, seeded(seed, seed + 100, seed + 200))
        for row, ok, seen in zip(anchors, valid, reached, strict=True):
            chosen = row[ok].tolist()
            assert chosen == sorted(set(chosen))
            assert ok.tolist() == sorted(ok.tolist(), reverse=True)
            seen.update(chosen)
    assert reached == [set(a) for a in allowed]


def test_anchors_of_a_sequence_depend_on_its_own_generator_alone() -> None:
    batch = making.batch((20, 16), 3)
    alone = Batch(*(getattr(batch, name)[1:] for name in Batch.__slots__))
    alone = Batch(
        *(t if t.dim() == 1 else t[:, :16] for t in (getattr(alone, name) for name in Batch.__slots__))
    )
    both = sample_anchors(making.padded(batch, 9), 5, seeded(4, 5))[0][1]
    assert torch.equal(both, sample_anchors(alone, 5, seeded(5))[0][0])
    assert not torch.equal(both, sample_anchors(alone, 5, seeded(6))[0][0])


def test_first_weights_have_the_names_and_shapes_of_the_checkpoint() -> None:
    config, tensors = m.dflash(layers=3, taps=(1, 4))
    params = init_dflash(making.dflash_spec(config), torch.Generator().manual_seed(0))
    assert {n: t.shape for n, t in params.items()} == {n: t.shape for n, t in tensors.items()}
    assert {t.dtype for t in params.values()} == {torch.float32}
    again = init_dflash(making.dflash_spec(config), torch.Generator().manual_seed(0))
    assert all(torch.equal(params[n], again[n]) for n in params)
    assert F.linear(torch.randn(500, m.D), params["layers.0.mlp.gate_proj.weight"]).std() == pytest.approx(
        1, abs=0.2
    )
