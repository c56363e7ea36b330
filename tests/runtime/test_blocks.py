"""The block allocator against a plain model of what it promises, under any order of calls."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from m27quant.runtime.blocks import Blocks, extend_hashes

SIZE, COUNT = 2, 6


class AnyOrder(RuleBasedStateMachine):
    """Sequences come, grow, publish and go; content says what a block was last published with."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(COUNT, SIZE)
        self.held: list[tuple[list[int], list[int]]] = []
        """(tokens, blocks) of each sequence."""
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def come(self, tokens: list[int]) -> None:
        hashes: list[bytes] = []
        extend_hashes(hashes, tokens, SIZE, len(tokens))
        assert len(hashes) == len(tokens) // SIZE
        reused = self.blocks.reuse(hashes)
        for index, block in enumerate(reused):
            assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])
        wanted = self.blocks.count(len(tokens)) - len(reused)
        free = self.blocks.num_free
        new = self.blocks.allocate(wanted)
        if new is None:
            assert wanted > free
            self.blocks.release(reused)
            return
        assert len(new) == wanted
        for block in new:
            self.content.pop(block, None)
        mine = [*reused, *new]
        assert len(set(mine)) == len(mine)
        self.held.append((tokens, mine))
        for index in range(len(tokens) // SIZE):
            self.blocks.publish(mine[index], hashes[index])
            self.content[mine[index]] = tuple(tokens[: (index + 1) * SIZE])

    @rule(which=st.integers(0, 5))
    def go(self, which: int) -> None:
        if which < len(self.held):
            self.blocks.release(self.held.pop(which)[1])

    @invariant()
    def nobody_holds_a_free_block(self) -> None:
        taken = {block for _, mine in self.held for block in mine}
        assert self.blocks.num_free == COUNT - len(taken)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_beginning_is_reused_after_its_sequence_went() -> None:
    blocks = Blocks(4, 2)
    hashes: list[bytes] = []
    extend_hashes(hashes, [1, 2, 3, 4], 2, 4)
    mine = blocks.allocate(2)
    assert mine is not None
    for block, hash_ in zip(mine, hashes, strict=True):
        blocks.publish(block, hash_)
    blocks.release(mine)
    assert blocks.num_free == 4
    assert blocks.reuse(hashes) == mine
    assert blocks.num_free == 2
    assert blocks.allocate(3) is None
    assert blocks.reuse([b"another", *hashes]) == []


def test_the_end_of_a_sequence_is_given_out_before_its_beginning() -> None:
    blocks = Blocks(3, 2)
    mine = blocks.allocate(3)
    assert mine is not None
    blocks.release(mine)
    assert blocks.allocate(1) == [mine[2]]


def test_without_reuse_nothing_is_known() -> None:
    blocks = Blocks(2, 2, reusing=False)
    mine = blocks.allocate(1)
    assert mine is not None
    blocks.publish(mine[0], b"x")
    assert blocks.reuse([b"x"]) == []


def test_a_hash_covers_everything_before_it() -> None:
    def hashes(tokens: list[int]) -> list[bytes]:
        found: list[bytes] = []
        extend_hashes(found, tokens, 2, len(tokens))
        return found

    assert hashes([1, 2, 3, 4])[0] == hashes([1, 2, 9, 9])[0]
    assert hashes([1, 2, 3, 4])[1] != hashes([2, 1, 3, 4])[1]
    assert hashes([1, 2, 3]) == hashes([1, 2])
    grown = hashes([1, 2])
    extend_hashes(grown, [1, 2, 3, 4, 5], 2, 5)
    assert grown == hashes([1, 2, 3, 4])
