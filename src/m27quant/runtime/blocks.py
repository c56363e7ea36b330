"""Which block of the cache belongs to whom: reference counts, and reuse of what a beginning has in common.

A full block is known by the hash of all tokens up to its end; a sequence that begins with the same tokens takes it
instead of computing it again.  A block that nobody holds stays known until it is needed, the longest unused first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Tokens
from itertools import takewhile


class Blocks:
    """The allocator: numbers of blocks, no tensor."""

    def __init__(self, num_blocks: int, block_size: int, *, reusing: bool = True) -> None:
        self.num_blocks, self.block_size, self._reusing = num_blocks, block_size, reusing
        self._holders = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}
        self._free = dict.fromkeys(range(num_blocks))  # in the order in which they are given out

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def count(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of which nothing is known any more; None, and nothing happens, where there are fewer."""
        if count > len(self._free):
            return None
        taken = [block for block, _ in zip(self._free, range(count), strict=False)]
        for block in taken:
            del self._free[block]
            self._holders[block] = 1
            if (known := self._hash[block]) is not None:
                del self._known[known]
                self._hash[block] = None
        return taken

    def reuse(self, hashes: Tokens[bytes]) -> list[int]:
        """The blocks of the longest known beginning, held once more."""
        blocks = [self._known[h] for h in takewhile(self._known.__contains__, hashes)]
        for block in blocks:
            self._free.pop(block, None)
            self._holders[block] += 1
        return blocks

    def publish(self, block: int, hash_: bytes) -> None:
        """A block is full and computed: others may reuse it.  Of two alike the first is kept."""
        if self._reusing and self._hash[block] is None and hash_ not in self._known:
            self._hash[block] = hash_
            self._known[hash_] = block

    def forget(self) -> None:
        """Nothing that is computed so far will be reused."""
        self._known.clear()
        self._hash = [None] * self.num_blocks

    def release(self, blocks: Tokens[int]) -> None:
        """Let go of a sequence's blocks; its last ones are given out first, a beginning is the likeliest reused."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, "released more often than held"
            if not self._holders[block]:
                self._free[block] = None


def extend_hashes(hashes: list[bytes], tokens: Tokens[int], block_size: int, end: int) -> None:
    """Append the hashes that `hashes` lacks of full blocks in tokens[:end], each over all that comes before."""
    for begin in range(len(hashes) * block_size, end - block_size + 1, block_size):
        digest = hashlib.blake2b(hashes[-1] if hashes else b"", digest_size=16)
        for token in tokens[begin : begin + block_size]:
            digest.update(token.to_bytes(4, "little"))
        hashes.append(digest.digest())
