"""Trees of drafts against a second implementation that knows no candidate numbers, ties included."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from m27quant.runtime.speculative.tree import Growth, num_candidates, stable_topk
from tests.runtime.speculative.rederived import draft_tree

V = 11


def table(path: tuple[int, ...], seed: int, levels: int | None) -> Tensor:
    """Log probabilities behind a path; few levels make many ties."""
    generator = torch.Generator().manual_seed(hash((seed, path)) % 2**31)
    if levels is not None:
        return torch.randint(levels, (V,), generator=generator).float().negative()
    return torch.randn(V, generator=generator).log_softmax(0)


def grow(seeds: list[int], steps: int, topk: int, levels: int | None) -> Growth:
    growth = Growth(topk)
    frontier = growth.start(torch.stack([table((), seed, levels) for seed in seeds]))
    paths = [[(row,) for row in rows] for rows in frontier.rows_bF.tolist()]
    for _ in range(steps - 1):
        rows = [[table(path, seed, levels) for path in of] for of, seed in zip(paths, seeds, strict=True)]
        frontier = growth.grow(frontier, torch.stack([torch.stack(r) for r in rows]))
        paths = [
            [(*of[parent], row) for parent, row in zip(parents, rows, strict=True)]
            for of, parents, rows in zip(
                paths, frontier.parents_bF.tolist(), frontier.rows_bF.tolist(), strict=True
            )
        ]
    return growth


@hypothesis.given(
    seed=st.integers(0, 10**6), steps=st.integers(1, 4), topk=st.integers(1, 5), share=st.floats(0, 1),
    levels=st.sampled_from([None, None, 1, 2, 5]),
)  # fmt: skip
@hypothesis.settings(max_examples=150)
def test_the_tree_is_that_of_a_second_implementation(
    seed: int, steps: int, topk: int, share: float, levels: int | None
) -> None:
    kept = max(1, round(share * num_candidates(steps, topk)))
    growth = grow([seed, seed + 1], steps, topk, levels)
    for b, tree in enumerate(growth.prune(kept, [99, 99])):
        expected = draft_tree(
            lambda path, b=b: table(tuple(path), seed + b, levels), steps, topk, kept + 1, lambda row: row
        )
        assert tree == expected
        parents = tree[1]
        assert all(parent < node for node, parent in enumerate(parents))
        siblings = list(zip(parents, tree[0], strict=True))
        assert len(set(siblings)) == len(siblings)


def test_candidates_are_counted_as_sglang_counts_them() -> None:
    assert num_candidates(3, 4) == 36
    growth = grow([0], 3, 4, None)
    assert [level.shape[1] for level in growth.scores] == [4, 16, 16]


def test_a_limit_cuts_levels_and_nodes() -> None:
    growth = grow([0, 0, 0], 3, 4, None)
    shallow, one, none = growth.prune(7, [2, 1, 0])
    assert len(shallow[0]) == 2
    assert one == ([int(table((), 0, None).argmax())], [-1])
    assert none == ([], [])


def test_nan_scores_still_make_a_tree() -> None:
    growth = Growth(2)
    frontier = growth.start(torch.full((1, V), float("nan")))
    growth.grow(frontier, torch.full((1, 2, V), float("nan")))
    ((rows, parents),) = growth.prune(4, [9])
    assert len(rows) == len(parents)
    assert all(parent < node for node, parent in enumerate(parents))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_equal_values_come_by_index(k: int) -> None:
    values, indices = stable_topk(torch.tensor([[2.0, 3.0, 2.0, 3.0, 3.0, 2.0]]), k)
    assert values.tolist()[0] == [3.0, 3.0, 3.0, 2.0, 2.0, 2.0][:k]
    assert sorted(indices.tolist()[0][:3]) == indices.tolist()[0][:3]
