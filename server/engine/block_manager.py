"""Which KV blocks are whose. Handles integers only; what the blocks hold is the cache's affair.

A sequence gets all the blocks that it can come to need when it is admitted, so that decoding never runs out.
Block 0 is nobody's: it pads block tables.
"""

from __future__ import annotations


class BlockManager:
    """Blocks are free, held by one sequence, or dirty: given back by a private sequence and not yet zeroed. The ones
    freed last are handed out first: memory that nobody has touched yet is the slowest."""

    def __init__(self, blocks: int, block_size: int) -> None:
        if blocks < 2:
            raise ValueError("the KV cache needs at least two blocks, one of which pads")
        self.block_size = block_size
        self.total = blocks - 1
        self._free = list(range(blocks - 1, 0, -1))  # the next one last
        self._dirty: list[int] = []
        self._held: set[int] = set()

    @property
    def used(self) -> int:
        return len(self._held)

    @property
    def free_count(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def can_allocate(self, tokens: int) -> bool:
        return self.blocks_for(tokens) <= len(self._free)

    def allocate(self, tokens: int) -> list[int]:
        """Blocks for ``tokens`` positions. The caller has asked ``can_allocate``."""
        assert self.can_allocate(tokens), "allocate without can_allocate"
        blocks = [self._free.pop() for _ in range(self.blocks_for(tokens))]
        self._held.update(blocks)
        return blocks

    def free(self, blocks: list[int], *, dirty: bool) -> None:
        """Give ``blocks`` back; ``dirty`` ones cannot be handed out before they went through ``take_dirty``."""
        assert self._held.issuperset(blocks), "freed a block that nobody holds"
        self._held.difference_update(blocks)
        if dirty:
            self._dirty.extend(blocks)
        else:
            self._free.extend(reversed(blocks))

    def take_dirty(self) -> tuple[int, ...]:
        """The blocks that the caller will zero before anything else touches the cache; free from now on."""
        taken = tuple(self._dirty)
        self._dirty.clear()
        self._free.extend(reversed(taken))
        return taken

    def check_integrity(self) -> None:
        """Every block is in exactly one place. For tests."""
        everywhere = [*self._free, *self._dirty, *self._held]
        assert sorted(everywhere) == list(range(1, self.total + 1)), "blocks lost or held twice"
