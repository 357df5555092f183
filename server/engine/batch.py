"""Chunks of a plan as tensors: ids, positions, slots, block tables. Knows shapes, not what is computed with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from model.kv_cache import PADDING_BLOCK, Segment, prefill_segment
from server.engine.plan import Chunk

Wanted = list[tuple[Chunk, int]]  # chunks with rows of logits, and how many


class Batch:
    """``chunks`` laid out one after the other: ``starts`` says at which row each begins."""

    def __init__(self, chunks: Many[Chunk], *, block_size: int, device: torch.device) -> None:
        self.chunks, self._block_size, self._device = chunks, block_size, device
        self.starts: dict[Chunk, int] = {}
        self.rows = 0
        for chunk in chunks:
            self.starts[chunk] = self.rows
            self.rows += chunk.length

    def numbers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def ids(self) -> Tensor:
        return self.numbers([token for c in self.chunks for token in c.sequence.token_ids[c.start : c.end]])

    def positions(self) -> Tensor:
        return self.numbers([position for c in self.chunks for position in range(c.start, c.end)])

    def slots(self) -> Tensor:
        size = self._block_size
        return self.numbers(
            [c.sequence.block_table[p // size] * size + p % size for c in self.chunks for p in range(c.start, c.end)]
        )

    def tables(self, chunks: Many[Chunk]) -> Tensor:
        """Block tables up to each chunk's end, padded to the longest: ``[m, b]``."""
        counts = [-(-chunk.end // self._block_size) for chunk in chunks]
        longest = max(counts)
        padded = [
            chunk.sequence.block_table[:count] + [PADDING_BLOCK] * (longest - count)
            for chunk, count in zip(chunks, counts, strict=True)
        ]
        return torch.tensor(padded, dtype=torch.int64, device=self._device)

    def rows_of(self, chunks: Many[Chunk]) -> Tensor:
        return self.numbers([self.starts[c] + i for c in chunks for i in range(c.length)])

    def prompt_segments(self, chunks: Many[Chunk]) -> list[Segment]:
        """Chunks of equal place and length as one segment each."""
        alike: defaultdict[tuple[int, int], list[Chunk]] = defaultdict(list)
        for chunk in chunks:
            alike[chunk.start, chunk.length].append(chunk)
        return [
            prefill_segment(self.rows_of(same), self.tables(same), start=start, length=length)
            for (start, length), same in alike.items()
        ]

    def privacy(self) -> tuple[Tensor, Tensor]:
        """Temperatures and thresholds of private rows, both ``[rows]`` in float32."""
        pairs = [(chunk.sequence.request.privacy, chunk.length) for chunk in self.chunks]
        assert all(privacy is not None for privacy, _ in pairs), "a public chunk among the private ones"
        temperatures = [privacy.temperature for privacy, length in pairs if privacy for _ in range(length)]
        skip_below = [privacy.skip_below for privacy, length in pairs if privacy for _ in range(length)]
        return torch.tensor(temperatures, device=self._device), torch.tensor(skip_below, device=self._device)

    def wanted_rows(self) -> tuple[Wanted, Tensor]:
        """The chunks whose last so many rows need logits, and those rows."""
        wanted = [(chunk, count) for chunk in self.chunks if (count := wanted_of(chunk))]
        rows = [self.starts[chunk] + chunk.length - count + i for chunk, count in wanted for i in range(count)]
        return wanted, self.numbers(rows)


def wanted_of(chunk: Chunk) -> int:
    """How many of the chunk's last rows need logits."""
    return chunk.length if chunk.scores_prompt else int(chunk.samples)
