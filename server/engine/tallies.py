"""What each sequence mixed with: heard while a step is computed, added up afterwards, so that no GPU waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from model.config import ModelConfig
from server.engine.plan import Chunk, Group
from server.engine.request import MixingPart


class Tallies:
    """``filled``: groups are completed with reference members, which count."""

    def __init__(self, config: ModelConfig, *, filled: bool) -> None:
        self._layers, self._size, self._filled = config.n_layer, config.group_size, filled
        self._due: list[Callable[[], None]] = []
        self._on_device = False

    def shared(self, chunks: Sequence[Chunk], groups: Sequence[Group], entropy: Tensor) -> None:
        """``entropy [groups]``, summed over the layers; groups are of the chunks' rows."""
        self._due.append(partial(self._add_shared, chunks, groups, self._to_host(entropy)))

    def private(self, chunks: Sequence[Chunk], entropy: Tensor) -> None:
        """``entropy [rows]`` or more, summed over the layers."""
        self._due.append(partial(self._add_private, chunks, self._to_host(entropy)))

    def settle(self) -> None:
        """To be called when the step's results are there."""
        if self._on_device:
            torch.cuda.synchronize()  # what is on its way to host memory
        for add in self._due:
            add()
        self._due.clear()

    def _add_shared(self, chunks: Sequence[Chunk], groups: Sequence[Group], entropy: Tensor) -> None:
        owner = [chunk.sequence.tally for chunk in chunks for _ in range(chunk.length)]
        for group, value in zip(groups, (entropy / self._layers).tolist(), strict=True):
            live = len(group.rows)
            reference = self._size - live if self._filled else 0
            part = MixingPart(1, live, reference, value)
            for row in group.rows:
                owner[row].add(part)

    def _add_private(self, chunks: Sequence[Chunk], entropy: Tensor) -> None:
        reference = self._size - 1 if self._filled else 0
        each = (entropy / self._layers).tolist()
        row = 0
        for chunk in chunks:
            spent = sum(each[row : row + chunk.length])
            chunk.sequence.tally.add(MixingPart(chunk.length, chunk.length, reference * chunk.length, spent))
            row += chunk.length

    def _to_host(self, entropy: Tensor) -> Tensor:
        self._on_device = entropy.is_cuda
        return entropy.to("cpu", non_blocking=True) if entropy.is_cuda else entropy
