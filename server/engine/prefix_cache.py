"""Prompt beginnings of private requests whose keys and values are kept for others of the same kind.

A private token's keys and values depend on its prefix, its temperature pair and the reference crowd alone, so whoever
asks the same in the same way may read them. Integers and hashes only. What a public request leaves depends on its
companions and is never kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from server.engine.block_manager import BlockManager
from server.engine.request import EngineRequest, MixingPart


@dataclass
class _Unit:
    blocks: tuple[int, ...]
    part: MixingPart  # what its tokens add to a receipt: a hit must not show there
    users: int = 0


class PrefixCache:
    """Units of ``unit`` tokens, chained by hash: a unit's key stands for everything before it too.

    Blocks of units that nobody uses are given back, the least recently used first, when they are needed.
    """

    def __init__(self, blocks: BlockManager, unit: int) -> None:
        assert unit % blocks.block_size == 0, "a unit is made of whole blocks"
        self._blocks, self.unit = blocks, unit
        self._units: OrderedDict[bytes, _Unit] = OrderedDict()
        self._idle_blocks = 0

    @property
    def idle_blocks(self) -> int:
        """Blocks that ``reclaim`` could give back."""
        return self._idle_blocks

    def keys(self, request: EngineRequest, prompt: tuple[int, ...]) -> list[bytes]:
        """The keys of a prompt's whole units; its last token is never among them, since its logits are wanted. None at
        all for requests that may not share: public ones, those that ask for every prompt token's log probability, and
        those whose tenant is everybody, unless they bring a salt of their own."""
        if request.privacy is None or request.sampling.prompt_logprobs is not None:
            return []
        if not request.tenant and request.cache_salt is None:
            return []
        kind = (request.tenant, request.cache_salt, request.privacy.temperature, request.privacy.skip_below)
        digest = hashlib.sha256(repr(kind).encode()).digest()
        keys = []
        for end in range(self.unit, len(prompt), self.unit):
            digest = hashlib.sha256(digest + repr(prompt[end - self.unit : end]).encode()).digest()
            keys.append(digest)
        return keys

    def take(self, keys: list[bytes]) -> list[bytes]:
        """The longest beginning of ``keys`` that is here; its units stay until they are released."""
        taken = []
        for key in keys:
            unit = self._units.get(key)
            if unit is None:
                break
            if unit.users == 0:
                self._idle_blocks -= len(unit.blocks)
            unit.users += 1
            taken.append(key)
        return taken

    def offer(self, key: bytes, blocks: tuple[int, ...], part: MixingPart) -> bool:
        """Hand over a computed unit, which the giver goes on using. False when there is one already: the giver keeps
        its blocks."""
        if key in self._units:
            return False
        self._units[key] = _Unit(blocks, part, users=1)
        return True

    def blocks_of(self, keys: Iterable[bytes]) -> list[int]:
        return [block for key in keys for block in self._units[key].blocks]

    def parts_of(self, keys: Iterable[bytes]) -> list[MixingPart]:
        return [self._units[key].part for key in keys]

    def release(self, keys: list[bytes]) -> None:
        """The end of a chain becomes the older part: it is of no use without its beginning."""
        for key in reversed(keys):
            unit = self._units[key]
            unit.users -= 1
            assert unit.users >= 0, "released more often than taken"
            self._units.move_to_end(key)
            if unit.users == 0:
                self._idle_blocks += len(unit.blocks)

    def reclaim(self, count: int) -> None:
        """Give back at least ``count`` blocks, or all that nobody uses; they are dirty."""
        for key in [key for key, unit in self._units.items() if unit.users == 0]:
            if count <= 0:
                return
            blocks = list(self._units.pop(key).blocks)
            self._idle_blocks -= len(blocks)
            self._blocks.free(blocks, dirty=True)
            count -= len(blocks)

    def all_blocks(self) -> list[int]:
        """For integrity checks."""
        return self.blocks_of(self._units)
