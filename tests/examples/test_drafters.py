"""The tiny drafters and their training scripts: gradients, training and inference the same mathematics, cards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m27quant.checkpoint.config import read_config
from m27quant.runtime.speculative.dflash import DFlashDrafter
from m27quant.runtime.speculative.eagle3 import Eagle3Drafter
from m27quant.runtime.speculative.load import DrafterOptions, load_drafter
from m27quant.runtime.speculative.proposal import DraftRequest
from m27quant.verify.collect import Findings
from m27quant.verify.drafter import check_drafter
from m27quant.verify.findings import Severity

Script = Callable[[str], ModuleType]
KINDS = ("dflash", "eagle3")
V, D, T = 2048, 272, 40
ATOL = 2e-4
"""F32 against F32 in other orders of summation, over hidden states up to a hundred; drafts are compared exactly."""


@pytest.fixture
def borrowed() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(V, D, generator=generator), torch.randn(V, D, generator=generator) * D**-0.5


def history(num_taps: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V - 1, (T,), generator=generator), torch.randn(T, num_taps * D, generator=generator)


def load(repository: Path, kind: str, borrowed: tuple[torch.Tensor, torch.Tensor], **options: Any) -> Any:
    target, _ = read_config(repository / "examples/tiny-m27")
    folder = repository / f"examples/tiny-m27-{kind}"
    return load_drafter(folder, target, *borrowed, DrafterOptions(**options), dtype=torch.float32).drafter


@pytest.mark.parametrize("block", [8, 16])
def test_dflash_is_trained_as_it_is_run(
    repository: Path, script: Script, borrowed: tuple[torch.Tensor, torch.Tensor], block: int
) -> None:
    dflash = script("dflash")
    drafter = load(repository, "dflash", borrowed, num_draft_tokens=block - 1)
    assert isinstance(drafter, DFlashDrafter)
    assert drafter.taps == dflash.HIDDEN_STATES
    params = {
        n: t.float() for n, t in load_file(repository / "examples/tiny-m27-dflash/model.safetensors").items()
    }
    ids, taps = history(5)
    anchors = torch.tensor([[3, 17, 30]])
    with torch.no_grad():
        trained = dflash.forward(params, taps[None], ids[None], anchors, block, dflash.Target(*borrowed))[0]
    for row, anchor in enumerate(anchors[0].tolist()):
        drafter.propose([DraftRequest(row, ids[: anchor + 1].tolist(), taps[:anchor], 1)])
        with torch.inference_mode():
            run = drafter.block_hidden([(row, int(ids[anchor]))])[0, 1:]
        torch.testing.assert_close(trained[row], run, atol=ATOL, rtol=0)


def test_eagle3_is_trained_as_it_is_run(
    repository: Path, script: Script, borrowed: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The training-time test over the drafts of a chain gives that chain."""
    eagle3, dflash = script("eagle3"), script("dflash")
    drafter = load(repository, "eagle3", borrowed, num_steps=3)
    assert isinstance(drafter, Eagle3Drafter)
    assert drafter.taps == eagle3.HIDDEN_STATES
    params = {
        n: t.float() for n, t in load_file(repository / "examples/tiny-m27-eagle3/model.safetensors").items()
    }
    ids, taps = history(3)
    length = T - 5
    (proposal,) = drafter.propose([DraftRequest(0, ids[:length].tolist(), taps[: length - 1], 99)])
    ids[length : length + 3] = torch.tensor(proposal.tokens)
    with torch.no_grad():
        outputs = eagle3.forward(params, taps[None], ids[None], 5, 3, dflash.Target(*borrowed))
    rows = [int((hidden[0, length - 2 - 5] @ params["lm_head.weight"].T).argmax()) for hidden in outputs]
    offsets = load_file(repository / "examples/tiny-m27-eagle3/model.safetensors")["d2t"]
    assert [row + int(offsets[row]) for row in rows] == proposal.tokens


def test_attention_and_its_gradients_are_torchs(script: Script) -> None:
    model = script("drafter_model")
    generator = torch.Generator().manual_seed(0)
    B, R, S, d = 2, 6, 9, 8
    q, k, v = (torch.randn(B, h, n, d, generator=generator) for h, n in ((4, R), (2, S), (2, S)))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    seen = torch.rand(B, R, S, generator=generator) < 0.7
    seen[..., 0] = True
    mask = model.added_mask(seen, torch.float32)
    ours = model.MaskedAttention.apply(q, k, v, mask)
    reference = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    grad = torch.randn(ours.shape, generator=generator)
    pairs = (torch.autograd.grad(out, (q, k, v), grad) for out in (ours, reference))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_block_in_training_sees_nothing_else(
    script: Script, borrowed: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Changing features at or behind an anchor, or another block's anchor token, changes nothing."""
    dflash = script("dflash")
    params, target = dflash.init_dflash(0), dflash.Target(*borrowed)
    ids, taps = history(5)
    anchors = torch.tensor([[10, 20]])
    with torch.no_grad():
        before = dflash.forward(params, taps[None], ids[None], anchors, 8, target)[0]
        ids[20], taps[10:] = 7, 0.5
        after = dflash.forward(params, taps[None], ids[None], anchors, 8, target)[0]
    torch.testing.assert_close(before[0], after[0], atol=1e-5, rtol=0)
    assert not torch.allclose(before[1], after[1], atol=1e-2)


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_steps_are_walked_as_an_engine_makes_them(script: Script, num_drafts: int) -> None:
    acceptance = script("drafter_acceptance")
    hits = torch.tensor([[9, 9, 1, 0, 3, 2, 0, 1, 0, 0]]).clamp(max=num_drafts)
    found = acceptance.walk(hits, 2, num_drafts)
    steps = {1: [1, 1, 0, 1], 3: [1, 3]}[num_drafts]
    assert found.tau == pytest.approx(1 + sum(steps) / len(steps))
    assert found.c_k == pytest.approx(
        [sum(s >= k for s in steps) / len(steps) for k in range(1, num_drafts + 1)]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_engine_has_a_quarrel_with_them(repository: Path, kind: str) -> None:
    target, _ = read_config(repository / "examples/tiny-m27")
    found = Findings()
    check_drafter(repository / f"examples/tiny-m27-{kind}", target, found)
    assert not [f for f in found.finish() if f.severity is Severity.ERROR]


def test_all_examples_are_small(repository: Path) -> None:
    folders = [repository / "examples" / name for name in ("tiny-m27", "tiny-m27-dflash", "tiny-m27-eagle3")]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 20e6


@pytest.mark.parametrize("kind", KINDS)
def test_cards_state_more_than_prompt_lookup_reaches(repository: Path, kind: str) -> None:
    card = (repository / f"examples/tiny-m27-{kind}/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| \*\*([\d.]+)\*\* \| .* \| ([\d.]+) \|$", card, re.MULTILINE)
    assert len(rows) == 2
    for drafter, lookup in rows:
        assert float(drafter) > max(2.0, float(lookup))
    config = json.loads((repository / f"examples/tiny-m27-{kind}/config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == V
