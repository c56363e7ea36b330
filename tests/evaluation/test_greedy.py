"""Divergence points of greedy texts: three ways to the same number, and the definition itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from m27quant.checkpoint.source import Source
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.evaluation.greedy import Common, compare_streamed, compare_texts
from m27quant.evaluation.writing import Prompt, Unwritten, Written, make_prompts, write
from m27quant.runtime.streamed import Precision, logits
from tests.evaluation.conftest import CPU, PLAIN, Models

TOKENS = 12


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    windows = torch.randint(256, (24, 10), generator=torch.Generator().manual_seed(1))
    return make_prompts(list(windows), None, 24)


@pytest.fixture(scope="module")
def written(models: Models, prompts: list[Prompt]) -> tuple[Written, Written]:
    source, nvfp4 = models
    texts = (
        write(source, prompts, TOKENS, device=CPU),
        write(nvfp4, prompts, TOKENS, precision=PLAIN, device=CPU),
    )
    assert isinstance(texts[0], Written)
    assert isinstance(texts[1], Written)
    return texts[0], texts[1]


def test_common_beginnings() -> None:
    def common(reference: list[int], candidate: list[int]) -> Common:
        (found,) = compare_texts([([0], reference)], [([0], candidate)])
        return found

    assert common([1, 2, 3], [1, 2, 4]) == Common(2, False)
    assert common([1, 2, 3], [4, 2, 3]) == Common(0, False)
    assert common([1, 2, 3], [1, 2, 3]) == Common(3, True)
    assert common([1, 2], [1, 2, 3]) == Common(2, False)  # one has ended, the other not
    assert common([1, 2, 3], [1, 2]) == Common(2, False)


def test_whoever_writes_the_point_is_the_same(models: Models, written: tuple[Written, Written]) -> None:
    source, nvfp4 = models
    theirs, ours = (texts.continued for texts in written)
    found = compare_texts(theirs, ours)
    assert compare_streamed(theirs, nvfp4, precision=PLAIN, device=CPU) == found
    assert compare_streamed(ours, source, device=CPU) == found
    points = {common.num_tokens for common in found}
    assert len(points) > 4, "some early, some late"
    assert {common.is_identical for common in found} == {True, False}


def test_a_model_does_not_leave_its_own_text(models: Models, written: tuple[Written, Written]) -> None:
    own = compare_streamed(written[0].continued, models[0], device=CPU)
    assert own == [Common(TOKENS, True)] * len(own)


def test_by_definition(models: Models, prompts: list[Prompt]) -> None:
    """Token by token, each from a forward pass of its own over all that came before."""
    source, nvfp4 = models
    few = prompts[:3]

    def greedy(model: Source, prompt: list[int], precision: Precision | None) -> list[int]:
        ids = list(prompt)
        for _ in range(4):
            ids.append(int(logits(model, ids, precision=precision)[-1].argmax()))
        return ids[len(prompt) :]

    theirs = [(p.token_ids, greedy(source, p.token_ids, None)) for p in few]
    ours = [(p.token_ids, greedy(nvfp4, p.token_ids, PLAIN)) for p in few]
    found = compare_streamed(theirs, nvfp4, precision=PLAIN, device=CPU)
    assert found == compare_texts(theirs, ours)


def test_a_model_that_does_not_fit_says_so(models: Models, prompts: list[Prompt]) -> None:
    found = write(models[0], prompts, TOKENS, device=CPU, max_memory=1000)
    assert isinstance(found, Unwritten)
    assert "memory" in found.reason


def test_prompts_are_taken_at_even_distances() -> None:
    windows = [torch.arange(100 * i, 100 * i + 90) for i in range(8)]
    prompts = make_prompts(windows, None, 4)
    assert [p.token_ids[0] for p in prompts] == [0, 200, 400, 600]
    assert {len(p.token_ids) for p in prompts} == {45}
    assert [len(p.token_ids) for p in make_prompts([torch.arange(1000), torch.arange(1)], None, 9)] == [64, 1]
    assert make_prompts(windows, None, 0) == []


def test_chats_are_asked_where_the_template_takes_them(repository: Path, tmp_path: Path) -> None:
    tiny = repository / "examples/tiny-m27"
    windows = [torch.arange(90)]

    def chats(template: str | None = None, **options: int) -> int:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny / name, tmp_path / name)
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        return len(make_prompts(windows, Tokenizer(tmp_path), 1, **options)) - 1

    assert chats() == 8
    assert chats("{{ raise_exception('no tools here') }}") == 0
    assert chats(longest=300) == 0
