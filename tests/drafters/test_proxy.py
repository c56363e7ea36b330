"""The teacher-forced proxy: hand-made runs, and every figure against a loop in float64 that keeps nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m27quant.drafters.proxy import Proxy, block_anchors, pooled, teacher_forced
from m27quant.drafters.samples import Sample, sample_of
from m27quant.runtime.speculative.load import load_drafter
from tests.runtime.speculative import makers as m
from tests.runtime.speculative import rederived as r
from tests.tolerance import DRAFTER_ATOL

EMBED, HEAD = m.target_weights()


def loaded(folder: Path, config: dict[str, Any], tensors: m.Tensors) -> Any:
    m.write(folder, config, tensors)
    return load_drafter(folder, m.TARGET, EMBED, HEAD, dtype=torch.float32).drafter


def rederived(config: dict[str, Any], tensors: m.Tensors, text: list[int], taps: torch.Tensor, K: int) -> Any:
    """log q [K, W] at the places behind the anchor `at`, the text being given."""
    sizes = config.get("transformer_layer_config", config)
    heads = r.Heads(sizes, r.plain_inv_freq(sizes["head_dim"], sizes["rope_theta"]))
    head = tensors.get("lm_head.weight", HEAD).double()

    def dflash(at: int) -> torch.Tensor:
        rows = r.dflash_block(
            sizes, tensors, EMBED.double(), taps[:at].double(), text[at], K + 1, m.VOCAB - 1, heads
        )
        return torch.log_softmax(rows[1:] @ head.T, -1)

    def eagle3(at: int) -> torch.Tensor:
        model = r.Eagle3(config, tensors, EMBED, head, text[: at + 1], taps[:at], heads)
        return torch.stack([model.after(text[at + 1 : at + k])[1] for k in range(1, K + 1)])

    return eagle3 if "eagle_config" in config else dflash


def crafted(drafter: Any, taps: torch.Tensor, num_prompt: int, seed: int) -> Sample:
    """A text along which some drafts are right: pieces of the drafter's own proposals."""
    from m27quant.runtime.speculative.proposal import DraftRequest

    g = torch.Generator().manual_seed(seed)
    text = torch.randint(m.VOCAB - 1, (num_prompt + 1,), generator=g).tolist()
    while len(text) <= len(taps):
        (proposal,) = drafter.propose([DraftRequest(99, text, taps[: len(text) - 1], drafter.max_depth)])
        drafter.forget(99)
        right = int(torch.randint(drafter.max_depth, (1,), generator=g))
        text += [*proposal.tokens[:right], int(torch.randint(m.VOCAB - 1, (1,), generator=g))]
    text = text[: len(taps) + 1]
    return sample_of(str(seed), text[:num_prompt], text[num_prompt:])


@pytest.mark.parametrize("make", [m.dflash, m.dflash_speculators, m.eagle3])
@pytest.mark.parametrize("stride", [1, 3])
def test_against_a_loop(tmp_path: Path, make: Any, stride: int) -> None:
    config, tensors = make()
    drafter = loaded(tmp_path, config, tensors)
    K = drafter.max_depth
    g = torch.Generator().manual_seed(1)
    taps = [torch.randn(n, 3 * m.D, generator=g) for n in (30, 19, K + 3)]
    samples = [crafted(drafter, taps[i], prompt, i) for i, prompt in enumerate((4, 1, 6))]
    known = tensors["d2t"] + torch.arange(len(tensors["d2t"])) if "d2t" in tensors else torch.arange(m.VOCAB)
    proxy = pooled([teacher_forced(drafter, samples, taps, stride)], stride)
    assert proxy is not None
    losses: list[list[float]] = [[] for _ in range(K)]
    missing, all_runs = 0, []
    for sample, tap, stats in zip(samples, taps, proxy.runs, strict=True):
        text, runs = sample.ids, []
        log_q = rederived(config, tensors, text, tap, K)
        anchors = range(max(sample.num_prompt, 1), len(text) - K, stride)
        assert block_anchors(sample, K, stride) == list(anchors)
        for at in anchors:
            q, following = log_q(at), text[at + 1 : at + 1 + K]
            hits = [int(known[q[k].argmax()]) == following[k] for k in range(K)]
            runs.append([*hits, False].index(False))
            for k, token in enumerate(following):
                row = (known == token).nonzero().flatten().tolist()
                missing += not row
                losses[k] += [-float(q[k, row[0]])] if row else []
        assert list(stats.histogram) == [runs.count(a) for a in range(max(runs, default=-1) + 1)]
        all_runs += runs
    assert proxy.blocks == len(all_runs) > 5
    assert max(all_runs) > 1
    assert proxy.stats.m_accept == pytest.approx(sum(all_runs) / len(all_runs))
    flat = [loss for place in losses for loss in place]
    assert proxy.covered == pytest.approx(len(flat) / (len(flat) + missing))
    assert (missing > 0) == ("d2t" in tensors)
    assert proxy.losses == pytest.approx([sum(p) / len(p) for p in losses], abs=DRAFTER_ATOL)
    assert proxy.val_loss == pytest.approx(sum(flat) / len(flat), abs=DRAFTER_ATOL)


def test_blocks_lie_within_what_is_learned() -> None:
    sample = Sample("x", sample_of("x", range(40), []).tokens, ((0, 6), (10, 20), (30, 33)))
    assert block_anchors(sample, 3, 2) == [1, 10, 12, 14, 16]
    assert block_anchors(sample, 3, 100) == [1, 10]
    assert block_anchors(sample, 12, 1) == []


def test_no_block_is_no_proxy(tmp_path: Path) -> None:
    drafter = loaded(tmp_path, *m.dflash())
    sample = sample_of("x", [1, 2, 3], [4, 5])
    assert pooled([teacher_forced(drafter, [sample], [torch.zeros(5, 3 * m.D)], 1)], 1) is None


def test_groups_add_up(tmp_path: Path) -> None:
    drafter = loaded(tmp_path, *m.eagle3())
    g = torch.Generator().manual_seed(2)
    taps = [torch.randn(20, 3 * m.D, generator=g) for _ in range(4)]
    samples = [crafted(drafter, t, 3, i) for i, t in enumerate(taps)]
    whole = pooled([teacher_forced(drafter, samples, taps, 2)], 2)
    halves = pooled([teacher_forced(drafter, samples[i : i + 2], taps[i : i + 2], 2) for i in (0, 2)], 2)
    assert isinstance(whole, Proxy)
    assert isinstance(halves, Proxy)
    assert whole.runs == halves.runs
    assert whole.val_loss == pytest.approx(halves.val_loss, abs=1e-6)
