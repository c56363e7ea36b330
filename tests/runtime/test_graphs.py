"""Steps that are filled up to a size in store give what they give by themselves; on a GPU they are also replayed."""

from __future__ import annotations

import pytest
import torch

from m27quant import SamplingParams
from m27quant.runtime.api import LLM
from m27quant.runtime.graphs import MAX_ROWS, Graphs
from tests.checkpoints import Shape, write_checkpoint
from tests.runtime.engines import GuessingDrafter, Loaded

VOCAB = 64


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(write_checkpoint(tmp_path_factory.mktemp("graphs") / "fp8", Shape(vocab_size=VOCAB)))


class Counting(Graphs):
    """Also says which sizes came."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(llm.model, llm.engine.cache, llm.engine.taps)
        self.sizes: list[tuple[int, int]] = []

    def logits(self, rows: object) -> torch.Tensor:
        found = super().logits(rows)  # type: ignore[arg-type]
        self.sizes.append((len(found), max(key[0] for key in self._captured)))
        return found


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("count", [1, 3, 21])
def test_a_step_that_is_filled_up_gives_the_same(loaded: Loaded, count: int, drafting: bool) -> None:
    def make() -> LLM:
        drafter = GuessingDrafter(VOCAB, seed=5, taps=(0, 2), num_draft_tokens=3) if drafting else None
        return loaded.engine(num_blocks=120, block_size=4, drafter=drafter)

    prompts = [list(range(1, 4 + n)) for n in range(count)]
    params = [
        SamplingParams(max_tokens=4 + n % 5, temperature=0.0 if n % 2 else 1.0, seed=n) for n in range(count)
    ]
    plain = make().generate(prompts, params)
    llm = make()
    graphs = llm.engine.graphs = Counting(llm)
    found = llm.generate(prompts, params)
    assert [r.token_ids for r in found] == [r.token_ids for r in plain]
    assert len(graphs.sizes) >= 3
    if count == 21:
        assert any(size not in range(17) and size % 8 for size, _ in graphs.sizes), "some were filled up"


def test_prompts_and_large_steps_are_not_captured(loaded: Loaded) -> None:
    llm = loaded.engine(num_blocks=64)
    graphs = llm.engine.graphs = Counting(llm)
    llm.generate([[1, 2, 3]] * 2, SamplingParams(max_tokens=1))
    assert not graphs.sizes
    assert MAX_ROWS % 8 == 0


@pytest.mark.gpu
def test_on_a_gpu_replayed_steps_say_what_plain_ones_say(tmp_path: object) -> None:
    from pathlib import Path

    from benchmarks.synthetic import TINY
    from benchmarks.synthetic_nvfp4 import write_nvfp4
    from m27quant import load

    folder = write_nvfp4(Path(str(tmp_path)) / "model", TINY)
    prompts = [list(range(1, 10 + n)) for n in range(5)]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    given = {"check": False, "device": "cuda", "invariant": True, "max_model_len": 256}
    plain, replayed = (
        load(folder, cuda_graphs=graphs, **given).generate(prompts, params)  # type: ignore[arg-type]
        for graphs in (False, True)
    )
    assert [r.token_ids for r in replayed] == [r.token_ids for r in plain]
