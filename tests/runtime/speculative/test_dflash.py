"""DFlash: the block against a second derivation in float64, the context kept right, options within their bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m27quant.errors import UsageError
from m27quant.runtime.speculative.dflash import DFlashDrafter
from m27quant.runtime.speculative.load import DrafterOptions, load_drafter
from m27quant.runtime.speculative.proposal import DraftRequest
from tests.runtime.speculative import makers as m
from tests.runtime.speculative import rederived as r
from tests.tolerance import DRAFTER_ATOL

Visible = Callable[[int, int, int], bool]
EMBED, HEAD = m.target_weights()
N = 30


def load(folder: Path, made: tuple[dict[str, Any], m.Tensors], **options: Any) -> DFlashDrafter:
    m.write(folder, *made)
    loaded = load_drafter(folder, m.TARGET, EMBED, HEAD, DrafterOptions(**options), dtype=torch.float32)
    assert isinstance(loaded.drafter, DFlashDrafter)
    return loaded.drafter


def request(tokens: list[int], taps: Tensor, sequence: int = 0, max_tokens: int = 99) -> DraftRequest:
    return DraftRequest(sequence, tokens, taps, max_tokens)


def compare(
    tmp_path: Path, made: tuple[dict[str, Any], m.Tensors], visible: Visible | None = None, rows: int | None = None,
    frequencies: tuple[Tensor, float] | None = None,
) -> None:  # fmt: skip
    """Hidden states and drafts of one block, ours against the second derivation."""
    config, tensors = made
    sizes = config.get("transformer_layer_config", config)
    drafter = load(tmp_path, made, **({} if rows is None else {"num_draft_tokens": rows - 1}))
    rows = rows or config["block_size"]
    tokens, taps = m.history(N, tensors["fc.weight"].shape[1])
    (proposal,) = drafter.propose([request(tokens, taps)])
    inv_freq, factor = frequencies or (r.plain_inv_freq(sizes["head_dim"], sizes["rope_theta"]), 1.0)
    heads = r.Heads(sizes, inv_freq, factor)
    expected = r.dflash_block(sizes, tensors, EMBED, taps, tokens[-1], rows, m.VOCAB - 1, heads, visible)
    with torch.inference_mode():
        ours = drafter.block_hidden([(0, tokens[-1])])[0]
    torch.testing.assert_close(ours.double(), expected, atol=DRAFTER_ATOL, rtol=0)
    head = tensors.get("lm_head.weight", HEAD).double()
    best = (expected[1:] @ head.T).argmax(-1)
    if "d2t" in tensors:
        best = best + tensors["d2t"][best]
    assert proposal.tokens == best.tolist()
    assert proposal.parents == list(range(-1, rows - 2))


@pytest.mark.parametrize("block", [2, 8, 16])
@pytest.mark.parametrize(
    "shape", [{}, {"layers": 1, "taps": (3,)}, {"layers": 3, "heads": 6, "kv_heads": 1, "head_dim": 4},
              {"heads": 2, "kv_heads": 2, "head_dim": 16, "taps": (0, 2, 4, 6, 11)}],
    ids=["2 layers", "1 tap", "6/1 heads", "last layer tapped"],
)  # fmt: skip
def test_a_block_is_what_the_formulas_say(tmp_path: Path, block: int, shape: dict[str, Any]) -> None:
    compare(tmp_path, m.dflash(block=block, **shape))


def test_fewer_drafts_shorten_the_block(tmp_path: Path) -> None:
    compare(tmp_path, m.dflash(block=16), rows=8)


def test_a_reduced_vocabulary(tmp_path: Path) -> None:
    compare(tmp_path, m.dflash_speculators())


def sliding(window: int, block: int, types: list[str], causal: bool | None = None) -> Visible:
    """Windows counted from the slot itself (SGLang, vLLM)."""

    def visible(layer: int, row: int, position: int) -> bool:
        is_sliding = types[layer] == "sliding_attention"
        at = N - 1 + row
        near = not is_sliding or position > at - window
        ordered = is_sliding if causal is None else causal
        return near and (position <= at or not ordered)

    return visible


TYPES = ["sliding_attention", "full_attention"]


def test_sliding_layers_are_causal_in_the_block(tmp_path: Path) -> None:
    made = m.dflash(layer_types=TYPES, sliding_window=12)
    compare(tmp_path, made, sliding(12, 8, TYPES))


@pytest.mark.parametrize("window", [3, 12, 200])
def test_a_window_on_all_layers(tmp_path: Path, window: int) -> None:
    config, tensors = m.dflash()
    config["dflash_config"] |= {"use_swa": True, "swa_window_size": window}
    everywhere = ["sliding_attention"] * 2
    compare(tmp_path, (config, tensors), sliding(window, 8, everywhere, causal=False))


@pytest.mark.parametrize(("top", "nested"), [(None, True), (True, False), (False, True)])
def test_stated_causality_comes_before_that_of_layers(tmp_path: Path, top: bool | None, nested: bool) -> None:
    config, tensors = m.dflash(
        layer_types=TYPES, sliding_window=9, **({} if top is None else {"is_causal": top})
    )
    config["dflash_config"]["causal"] = nested
    compare(tmp_path, (config, tensors), sliding(9, 8, TYPES, causal=nested if top is None else top))


@pytest.mark.parametrize("non_causal", [False, True])
def test_speculators_windows_end_at_the_anchor(tmp_path: Path, non_causal: bool) -> None:
    config, tensors = m.dflash_speculators(layer_types=TYPES, sliding_window=9)
    config["sliding_window_non_causal"] = non_causal
    anchor = N - 1

    def visible(layer: int, row: int, position: int) -> bool:
        if TYPES[layer] == "full_attention":
            return True
        if position < anchor:
            return position >= anchor - 9
        return non_causal or position <= anchor + row

    compare(tmp_path, (config, tensors), visible)


def test_yarn(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8,
               "beta_slow": 1}  # fmt: skip
    frequencies = r.yarn_inv_freq(8, 1000.0, 4.0, 64, 8, 1)
    compare(tmp_path, m.dflash(rope_scaling=scaling), frequencies=frequencies)


def test_the_context_grows_as_tokens_are_committed(tmp_path: Path) -> None:
    """Any chunking of the taps, with or without drafting in between, drafts what one call drafts."""
    tokens, taps = m.history(400, 3 * m.D)
    drafter = load(tmp_path, m.dflash())
    (whole,) = drafter.propose([request(tokens, taps, 1)])
    begin = 0
    for end, wanted in ((100, 0), (101, 7), (108, 3), (300, 99), (400, 99)):
        (last,) = drafter.propose([request(tokens[:end], taps[begin : end - 1], 2, wanted)])
        assert len(last.tokens) == min(wanted, 7)
        begin = end - 1
    assert last == whole
    read = drafter.context.read
    torch.testing.assert_close(read(1), read(2), atol=DRAFTER_ATOL, rtol=0)


def test_together_as_alone(tmp_path: Path) -> None:
    drafter = load(tmp_path, m.dflash(layer_types=TYPES, sliding_window=6))
    histories = [m.history(n, 3 * m.D, seed=n) for n in (2, 1, 40, 9)]
    alone = []
    for i, (tokens, taps) in enumerate(histories):
        alone += drafter.propose([request(tokens, taps, i)])
    drafter_2 = load(tmp_path, m.dflash(layer_types=TYPES, sliding_window=6))
    assert drafter_2.propose([request(t, x, 10 + i) for i, (t, x) in enumerate(histories)]) == alone


def test_forgotten_sequences_begin_again(tmp_path: Path) -> None:
    drafter = load(tmp_path, m.dflash())
    tokens, taps = m.history(20, 3 * m.D)
    (first,) = drafter.propose([request(tokens, taps)])
    drafter.forget(0)
    assert drafter.context.nbytes == 0
    assert drafter.propose([request(tokens, taps)]) == [first]


def test_taps_that_do_not_continue_are_refused(tmp_path: Path) -> None:
    drafter = load(tmp_path, m.dflash())
    tokens, taps = m.history(20, 3 * m.D)
    for wrong in (taps[:-1], taps[:, 1:], None):
        with pytest.raises(ValueError, match="sequence 0: taps of 20 tokens after 0 known positions"):
            drafter.propose([DraftRequest(0, tokens, wrong, 5)])


@pytest.mark.parametrize("count", [0, 8, -1])
def test_more_drafts_than_a_block_holds(tmp_path: Path, count: int) -> None:
    with pytest.raises(
        UsageError, match=f"num_draft_tokens is {count}; this drafter's block_size 8 allows 1 to 7"
    ):
        load(tmp_path, m.dflash(), num_draft_tokens=count)


def test_bf16_follows_f32(tmp_path: Path) -> None:
    made = m.dflash()
    drafter = load(tmp_path, made)
    half = load_drafter(tmp_path, m.TARGET, EMBED, HEAD, dtype=torch.bfloat16).drafter
    assert isinstance(half, DFlashDrafter)
    tokens, taps = m.history(N, 3 * m.D)
    for d in (drafter, half):
        d.propose([request(tokens, taps)])
    with torch.inference_mode():
        a, b = (d.block_hidden([(0, tokens[-1])]) for d in (drafter, half))
    assert b.dtype == torch.bfloat16
    assert float((a - b.float()).abs().max()) < 0.15
