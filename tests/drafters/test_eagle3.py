"""EAGLE3 in training: its steps are the inference chain, loss and gradients derived a second time, what a slot sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m27quant.drafters.batch import Batch, LossReport
from m27quant.drafters.eagle3 import (
    Vocabulary,
    chain_hidden,
    draft_vocabulary,
    eagle3_loss,
    init_eagle3,
)
from m27quant.runtime.speculative.eagle3 import Eagle3Drafter
from m27quant.runtime.speculative.load import DrafterOptions, load_drafter
from m27quant.runtime.speculative.proposal import DraftRequest
from tests.drafters import making
from tests.runtime.speculative import makers as m
from tests.runtime.speculative import rederived as r
from tests.tolerance import DRAFTER_ATOL, F64, GRADIENT_BF16_DB, TRAINING_F64, sqnr_db

LENGTHS, PROMPTS, STEPS, DECAY = (12, 9), (4, 6), 3, 0.8


def made(**extra: Any) -> tuple[dict[str, Any], m.Tensors, Vocabulary]:
    config, tensors = m.eagle3(**extra)
    return config, tensors, Vocabulary(tensors["d2t"] + torch.arange(len(tensors["d2t"])), m.VOCAB)


@pytest.mark.parametrize("seed", range(3))
def test_the_steps_are_the_inference_chain(tmp_path: Path, seed: int) -> None:
    """Text that goes on as the runtime drafts: each step's best token and hidden state are the chain's."""
    config, tensors, vocabulary = made(seed=seed)
    m.write(tmp_path, config, tensors)
    options, steps, n = DrafterOptions(num_steps=6), 6, 15
    drafter = load_drafter(
        tmp_path, m.TARGET, making.EMBED, making.HEAD, options, dtype=torch.float32
    ).drafter
    assert isinstance(drafter, Eagle3Drafter)
    tokens, taps = m.history(n, 3 * m.D, seed)
    (proposal,) = drafter.propose([DraftRequest(0, tokens, taps, 99)])
    batch = making.batch((n + steps,), 3 * m.D, dtype=torch.float32)
    batch.ids_BT[0] = torch.tensor([*tokens, *proposal.tokens])
    batch.taps_BTF[0, : n - 1] = taps
    hidden = chain_hidden(
        tensors, making.eagle3_spec(config), batch, making.shared(torch.float32), n - 4, steps
    )
    at = n - 2 - (n - 4)  # the slot of the last committed token
    drafted = [int((h[0, at] @ tensors["lm_head.weight"].T).argmax()) for h in hidden]
    assert vocabulary.tokens_W[drafted].tolist() == proposal.tokens
    alone = r.Eagle3(
        config, tensors, making.EMBED, tensors["lm_head.weight"], tokens, taps, making.heads(config)
    )
    for j, h in enumerate(hidden):
        expected, log_probs = alone.after(proposal.tokens[:j])
        normed = r.rms(expected, tensors["norm.weight"].double(), config["rms_norm_eps"])
        torch.testing.assert_close(h[0, at].double(), normed, atol=DRAFTER_ATOL, rtol=0)
        ours = torch.log_softmax(h[0, at] @ tensors["lm_head.weight"].T, -1).double()
        torch.testing.assert_close(ours, log_probs, atol=10 * DRAFTER_ATOL, rtol=0)


def derived(
    config: dict[str, Any], params: m.Tensors, vocabulary: Vocabulary, batch: Batch, soft: float
) -> tuple[Tensor, dict[str, list[float]]]:
    """The loss and the sums of its report, a slot and a step at a time."""
    total, rows = torch.zeros((), dtype=torch.float64), vocabulary.tokens_W.tolist()
    sums = {name: [0.0] * STEPS for name in ("losses", "hits", "chains", "counts", "tries")}
    target_head, head = making.HEAD.double(), params["lm_head.weight"]
    for b, length in enumerate(LENGTHS):
        ids = batch.ids_BT[b].tolist()
        for i in range(length - 2):
            model = r.Eagle3(
                config, params, making.EMBED, head, ids[: i + 2], batch.taps_BTF[b, : i + 1], making.heads(config)
            )  # fmt: skip
            chain = True
            for j in range(STEPS):
                t = i + 2 + j
                if t >= length or not batch.loss_mask_BT[b, t]:
                    break
                sums["tries"][j] += 1
                logits = target_head @ batch.final_BTD[b, t - 1]
                known = (soft == 0 or int(logits.argmax()) in rows) and (soft == 1 or ids[t] in rows)
                if not known:
                    chain = False
                    continue
                log_q = model.after(ids[i + 2 : t])[1]
                token = rows.index(ids[t]) if ids[t] in rows else -1
                loss = making.cross_entropy(log_q, token, logits[vocabulary.tokens_W], soft)
                hit = int(log_q.argmax()) == token
                chain = chain and hit
                total = total + DECAY**j * loss
                for name, value in zip(sums, (float(loss.detach()), hit, chain, 1), strict=False):
                    sums[name][j] += value
    return total / sums["counts"][0], sums


@pytest.mark.parametrize("soft", [0.0, 0.4, 1.0])
def test_loss_and_gradients_are_the_formulas(soft: float) -> None:
    config, tensors, vocabulary = made()
    batch, params = making.batch(LENGTHS, 3 * m.D, PROMPTS), making.wanting(tensors)
    known = vocabulary.tokens_W
    batch.ids_BT[:, ::2] = known[batch.ids_BT[:, ::2] % len(known)]  # else few tokens are
    batch.loss_mask_BT[0, 8] = False
    expected, sums = derived(config, params, vocabulary, batch, soft)
    report = eagle3_loss(
        params, making.eagle3_spec(config), batch, making.shared(), vocabulary,
        num_steps=STEPS, decay=DECAY, soft=soft,
    )  # fmt: skip
    assert abs(float((report.loss - expected).detach())) < TRAINING_F64
    assert 0 < sums["counts"][1] < sums["tries"][1]
    for name, values in sums.items():
        found = getattr(report, f"{name}_P")
        torch.testing.assert_close(
            found, torch.tensor(values, dtype=torch.float64), atol=TRAINING_F64, rtol=0
        )
    grads = zip(
        *(torch.autograd.grad(x, list(params.values())) for x in (report.loss, expected)), strict=True
    )
    for name, (ours, theirs) in zip(params, grads, strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, atol=TRAINING_F64, rtol=0)


def test_a_slot_sees_what_the_chain_has_and_nothing_later() -> None:
    """Every token and feature in turn, for every slot and step."""
    config, tensors, _ = made()
    spec, batch, shared = (
        making.eagle3_spec(config),
        making.batch((10,), 3 * m.D, dtype=torch.float32),
        making.shared(torch.float32),
    )
    before = chain_hidden(tensors, spec, batch, shared, 2, STEPS)
    for t in range(10):
        for field in ("ids_BT", "taps_BTF"):
            after = chain_hidden(tensors, spec, making.changed(batch, field, 0, t), shared, 2, STEPS)
            for j in range(STEPS):
                for slot, (old, new) in enumerate(zip(before[j][0], after[j][0], strict=True), 2):
                    seen = 1 <= t <= slot + 1 + j if field == "ids_BT" else t <= slot
                    assert torch.equal(old, new) != seen, (field, t, slot, j)


def run(
    batch: Batch, dtype: torch.dtype = torch.float64, steps: int = STEPS, soft: float = 0.4
) -> tuple[LossReport, Tensor]:
    """The loss and its gradient, one vector."""
    config, tensors, vocabulary = made()
    params = making.wanting(tensors, dtype)
    report = eagle3_loss(
        params, making.eagle3_spec(config), batch, making.shared(dtype), vocabulary,
        num_steps=steps, decay=DECAY, soft=soft,
    )  # fmt: skip
    grads = torch.autograd.grad(report.loss, list(params.values()))
    return report, torch.cat([g.flatten().double() for g in grads])


def test_padding_never_counts() -> None:
    batch = making.batch(LENGTHS, 3 * m.D, PROMPTS)
    (before, grad), (after, more) = run(batch), run(making.padded(batch, 5))
    torch.testing.assert_close(before.loss, after.loss, atol=F64, rtol=0)
    assert torch.equal(before.tries_P, after.tries_P)
    torch.testing.assert_close(grad, more, atol=F64, rtol=0)


def test_parts_of_a_batch_add_up_to_it() -> None:
    batch = making.batch(LENGTHS, 3 * m.D, PROMPTS)
    whole, grad = run(batch)
    parts = [run(Batch(*(getattr(batch, name)[b : b + 1] for name in Batch.__slots__))) for b in (0, 1)]
    total = parts[0][0] + parts[1][0]
    for name in ("loss", "weight", "losses_P", "hits_P", "chains_P", "counts_P", "tries_P"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name), atol=F64, rtol=0)
    weighted = sum((part.weight * g for part, g in parts), torch.zeros(())) / whole.weight
    torch.testing.assert_close(weighted, grad, atol=F64, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_texts(length: int) -> None:
    """Fewer positions than steps, or none to predict."""
    report, grad = run(making.batch((length,), 3 * m.D), steps=5, soft=1.0)
    assert report.tries_P.tolist() == [float(max(0, length - 2 - j)) for j in range(5)]
    assert grad.any() == bool(report.counts_P[0])


def test_a_step_in_bf16_points_where_the_one_in_f64_does() -> None:
    exact, rounded = (
        run(making.batch(LENGTHS, 3 * m.D, PROMPTS, dtype=dtype), dtype, soft=1.0)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert rounded[0].loss.dtype == torch.float32
    assert sqnr_db(exact[1], rounded[1]) > GRADIENT_BF16_DB


# -- vocabulary and first weights ------------------------------------------------------------------


def test_the_vocabulary_is_the_most_frequent_tokens() -> None:
    counts = torch.tensor([5, 0, 7, 5, 9, 5, 0, 1])
    vocabulary = draft_vocabulary(counts, 4)
    assert vocabulary.tokens_W.tolist() == [0, 2, 3, 4]  # of 0, 3 and 5, which are equal, the first two
    tables = vocabulary.tables()
    assert tables["d2t"].tolist() == [0, 1, 1, 1]
    assert tables["d2t"].dtype == torch.int64
    assert tables["t2d"].tolist() == [True, False, True, True, True, False, False, False]
    assert vocabulary.rows_V().tolist() == [0, -1, 1, 2, 3, -1, -1, -1]
    assert draft_vocabulary(counts, 8).tables()["d2t"].tolist() == [0] * 8


def test_what_is_trained_loads_as_a_drafter(tmp_path: Path) -> None:
    config, _, _ = made()
    vocabulary = draft_vocabulary(
        torch.randint(9, (m.VOCAB,), generator=torch.Generator().manual_seed(0)), 40
    )
    head = making.HEAD[vocabulary.tokens_W]
    params = init_eagle3(making.eagle3_spec(config), torch.Generator().manual_seed(0), head)
    assert torch.equal(params["lm_head.weight"], head)
    m.write(tmp_path, config, params | vocabulary.tables())
    loaded = load_drafter(tmp_path, m.TARGET, making.EMBED, making.HEAD, dtype=torch.float32)
    assert isinstance(loaded.drafter, Eagle3Drafter)
    assert torch.equal(loaded.drafter.weights.shared.tokens(torch.arange(40)), vocabulary.tokens_W)
