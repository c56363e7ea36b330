"""EAGLE3: chains and trees against a second derivation in float64 that computes every node from its whole path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m27quant.errors import UsageError
from m27quant.runtime.speculative.eagle3 import Eagle3Drafter
from m27quant.runtime.speculative.load import DrafterOptions, load_drafter
from m27quant.runtime.speculative.proposal import DraftRequest
from tests.runtime.speculative import makers as m
from tests.runtime.speculative import rederived as r
from tests.tolerance import DRAFTER_ATOL

EMBED, HEAD = m.target_weights()
N = 20


def load(folder: Path, made: tuple[dict[str, Any], m.Tensors], **options: Any) -> Eagle3Drafter:
    m.write(folder, *made)
    loaded = load_drafter(folder, m.TARGET, EMBED, HEAD, DrafterOptions(**options), dtype=torch.float32)
    assert isinstance(loaded.drafter, Eagle3Drafter)
    return loaded.drafter


def second(
    made: tuple[dict[str, Any], m.Tensors], tokens: list[int], taps: Tensor, **variant: Any
) -> r.Eagle3:
    config, tensors = made
    heads = r.Heads(config, r.plain_inv_freq(config["head_dim"], config["rope_theta"]))
    embed, head = tensors.get("embed_tokens.weight", EMBED), tensors.get("lm_head.weight", HEAD)
    prefix = "midlayer." if any(n.startswith("midlayer.") for n in tensors) else "layers.0."
    return r.Eagle3(config, tensors, embed, head, tokens, taps, heads, prefix, **variant)


def token_of(tensors: m.Tensors) -> Any:
    offsets = tensors.get("d2t", torch.zeros(m.VOCAB, dtype=torch.int64)).tolist()
    return lambda row: row + offsets[row]


def compare(
    folder: Path,
    made: tuple[dict[str, Any], m.Tensors],
    steps: int = 3,
    topk: int = 4,
    rows: int = 8,
    **variant: Any,
) -> None:
    """One proposal, ours against the second derivation; and the history's last hidden state."""
    drafter = load(folder, made, num_steps=steps, eagle_topk=topk, num_draft_tokens=rows)
    tokens, taps = m.history(N, made[1]["fc.weight"].shape[1])
    (ours,) = drafter.propose([DraftRequest(0, tokens, taps, 99)])
    oracle = second(made, tokens, taps, **variant)
    hidden, _ = oracle.after([])
    torch.testing.assert_close(drafter._last[0].double(), hidden, atol=DRAFTER_ATOL, rtol=0)
    known = r.draft_tree(lambda path: oracle.after(path)[1], steps, topk, rows, token_of(made[1]))
    assert (ours.tokens, ours.parents) == known


@pytest.mark.parametrize(("steps", "topk", "rows"), [(3, 1, 4), (5, 1, 6), (1, 1, 2), (3, 4, 8), (4, 2, 9), (1, 4, 3),
                                                     (3, 4, 37)])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_drafts_are_what_the_formulas_say(
    tmp_path: Path, seed: int, steps: int, topk: int, rows: int
) -> None:
    compare(tmp_path, m.eagle3(seed), steps, topk, rows)


def own_embedding(config: dict[str, Any], tensors: m.Tensors) -> None:
    tensors["embed_tokens.weight"] = torch.randn(m.VOCAB, m.D, generator=torch.Generator().manual_seed(9))


def norm_for_each_tap(config: dict[str, Any], tensors: m.Tensors) -> None:
    config["fc_norm"] = True
    g = torch.Generator().manual_seed(8)
    tensors |= {f"fc_norm.{k}.weight": m.norm(g, m.D) for k in range(3)}


def norm_before_fc(config: dict[str, Any], tensors: m.Tensors) -> None:
    config["eagle_config"]["norm_before_fc"] = True
    tensors["input_norm.weight"] = m.norm(torch.Generator().manual_seed(8), 3 * m.D)


VARIANTS: dict[str, tuple[dict[str, Any], m.Edit | None, dict[str, Any]]] = {
    "layers.0": ({"prefix": "layers.0."}, None, {}),
    "full vocabulary, borrowed head": ({"draft_vocab": None}, None, {}),
    "full vocabulary, own head": ({"draft_vocab": m.VOCAB}, None, {}),
    "own embedding": ({}, own_embedding, {}),
    "fc_norm": ({}, norm_for_each_tap, {}),
    "input_norm": ({}, norm_before_fc, {}),
    "norm_before_residual": ({"norm_before_residual": True}, None, {"norm_before_residual": True}),
    "norm_output": ({"prefix": "layers.0.", "norm_output": True}, None, {"norm_output": True}),
    "norm_output of SpecForge": ({"norm_output": True}, None, {}),
}


@pytest.mark.parametrize(("arguments", "edit", "variant"), VARIANTS.values(), ids=VARIANTS)
def test_variants(
    tmp_path: Path, arguments: dict[str, Any], edit: m.Edit | None, variant: dict[str, Any]
) -> None:
    made = m.eagle3(**arguments)
    if edit is not None:
        edit(*made)
    compare(tmp_path, made, **variant)


def test_logit_scale_sharpens_the_tree(tmp_path: Path) -> None:
    made = m.eagle3(logit_scale=0.25)
    drafter = load(tmp_path, made, eagle_topk=4, num_draft_tokens=8)
    tokens, taps = m.history(N, 3 * m.D)
    (ours,) = drafter.propose([DraftRequest(0, tokens, taps, 99)])
    scaled = (made[0], made[1] | {"lm_head.weight": made[1]["lm_head.weight"] * 0.25})
    oracle = second(scaled, tokens, taps)
    assert tuple(ours) == r.draft_tree(lambda path: oracle.after(path)[1], 3, 4, 8, token_of(made[1]))


def test_wider_features_than_hidden_size(tmp_path: Path) -> None:
    """A head with its own embedding and head may be of another width than its target."""
    target = m.TARGET
    config, tensors = m.eagle3(prefix="layers.0.", target_hidden_size=32)
    g = torch.Generator().manual_seed(3)
    tensors |= {
        "fc.weight": m.random(g, m.D, 96),
        "embed_tokens.weight": torch.randn(m.VOCAB, m.D, generator=g),
    }
    folder = m.write(tmp_path, config, tensors)
    wide = type(target)(**({name: getattr(target, name) for name in target.__slots__} | {"hidden_size": 32}))
    drafter = load_drafter(
        folder, wide, torch.zeros(m.VOCAB, 32), torch.zeros(m.VOCAB, 32), dtype=torch.float32
    ).drafter
    tokens, taps = m.history(N, 96)
    (ours,) = drafter.propose([DraftRequest(0, tokens, taps, 99)])
    oracle = second((config, tensors), tokens, taps)
    assert tuple(ours) == r.draft_tree(lambda path: oracle.after(path)[1], 3, 1, 4, token_of(tensors))


def test_history_grows_as_tokens_are_committed(tmp_path: Path) -> None:
    """Any chunking, with trees drafted and dropped in between, gives the keys, values and tree of one call."""
    tokens, taps = m.history(300, 3 * m.D)
    drafter = load(tmp_path, m.eagle3(), eagle_topk=4, num_draft_tokens=8)
    (whole,) = drafter.propose([DraftRequest(1, tokens, taps, 99)])
    begin = 0
    for end, wanted in ((1, 9), (150, 0), (151, 7), (155, 2), (290, 99), (300, 99), (300, 99)):
        (last,) = drafter.propose([DraftRequest(2, tokens[:end], taps[begin : end - 1], wanted)])
        assert len(last.tokens) <= min(wanted, 7)
        begin = end - 1
    assert last == whole
    torch.testing.assert_close(drafter.context.read(1), drafter.context.read(2), atol=DRAFTER_ATOL, rtol=0)


def test_together_as_alone(tmp_path: Path) -> None:
    histories = [m.history(n, 3 * m.D, seed=n) for n in (2, 40, 9, 1)]
    requests = [DraftRequest(i, t, x, 99) for i, (t, x) in enumerate(histories)]
    alone = [load(tmp_path, m.eagle3(), eagle_topk=3).propose([request])[0] for request in requests]
    assert alone[3].tokens == []
    assert load(tmp_path, m.eagle3(), eagle_topk=3).propose(requests) == alone


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_limits_bound_depth_and_number(tmp_path: Path, limit: int) -> None:
    drafter = load(tmp_path, m.eagle3(), eagle_topk=4, num_draft_tokens=20)
    tokens, taps = m.history(N, 3 * m.D)
    (tree,) = drafter.propose([DraftRequest(0, tokens, taps, limit)])
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    assert len(tree.tokens) == limit
    assert max(depths, default=0) <= limit


@pytest.mark.parametrize(("options", "words"), [
    ({"eagle_topk": 2, "num_draft_tokens": 12}, "num_draft_tokens is 12; 3 steps of top-2 make at most 11"),
    ({"num_steps": 0}, "num_steps 0"),
    ({"eagle_topk": 0, "num_draft_tokens": 4}, "eagle_topk 0"),
    ({"eagle_topk": 2, "num_draft_tokens": 1}, "num_draft_tokens 1"),
])  # fmt: skip
def test_settings_that_make_no_tree(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as fault:
        load(tmp_path, m.eagle3(), **options)
    assert words in fault.value.message


def test_a_chain_has_a_draft_for_each_step(tmp_path: Path) -> None:
    drafter = load(tmp_path, m.eagle3(), num_steps=5, num_draft_tokens=3)
    assert (drafter.num_draft_tokens, drafter.max_depth) == (5, 5)
