"""The plain path: torch's operations, on any device, in shapes that keep private rows to themselves.

Public rows run together. Private rows never share a tensor shape with anyone: a chunk of a private prompt runs alone,
private decoding runs in tiles of a fixed number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from model.groups import Fill
from model.kv_cache import PADDING_BLOCK, PagedAttention, PagedKVCache, Segment, decode_segment, prefill_segment
from model.layers import TILE, TiledArithmetic
from model.token_choice import TokenChoice
from model.transformer import Transformer
from server.engine.batch import Batch, Wanted, wanted_of
from server.engine.mixing_rows import private_rows, shared_groups
from server.engine.plan import Chunk, Group, Plan
from server.engine.tallies import Tallies


class PlainPasses:
    def __init__(self, model: Transformer, fill: Fill, cache: PagedKVCache, tallies: Tallies) -> None:
        self._model, self._fill, self._cache, self._tallies = model, fill, cache, tallies
        self._config = model.config

    def __call__(self, plan: Plan, groups: Many[Group]) -> tuple[Wanted, Tensor]:
        """The chunks that need logits, and these, float32, in the plan's order."""
        wanted, logits = self.public(plan.public, groups)
        found: dict[Chunk, Tensor] = {}
        decoding = [chunk for chunk in plan.private if chunk.decodes]
        for begin in range(0, len(decoding), TILE):
            found.update(self._private_tile(decoding[begin : begin + TILE]))
        for chunk in plan.private:
            if not chunk.decodes:
                found.update(self._private_prompt(chunk))
        wanted += [(chunk, found[chunk].shape[0]) for chunk in plan.private if chunk in found]
        return wanted, torch.cat([logits, *(found[chunk] for chunk in plan.private if chunk in found)])

    def public(self, chunks: Many[Chunk], groups: Many[Group]) -> tuple[Wanted, Tensor]:
        batch = self._batch(chunks)
        wanted, rows = batch.wanted_rows()
        if not chunks:
            return wanted, torch.empty(0, self._config.vocab_size, device=self._model.device)
        shared = shared_groups(self._config, self._fill, batch, groups)
        attention = PagedAttention(self._cache, self._config, batch.slots(), self._segments(batch))
        hidden = self._model(batch.ids(), batch.positions(), attention, shared or TokenChoice())
        if shared is not None:
            self._tallies.shared(chunks, groups, shared.entropy)
        return wanted, self._model.logits(hidden[rows]).float()

    def _segments(self, batch: Batch) -> list[Segment]:
        """All decoding rows as one segment, prompt chunks of equal place and length as one each."""
        segments = []
        decoding = [chunk for chunk in batch.chunks if chunk.decodes]
        if decoding:
            ends = batch.numbers([chunk.end for chunk in decoding])
            segments.append(decode_segment(batch.rows_of(decoding), batch.tables(decoding), ends))
        return segments + batch.prompt_segments([chunk for chunk in batch.chunks if not chunk.decodes])

    def _private_prompt(self, chunk: Chunk) -> dict[Chunk, Tensor]:
        """One chunk by itself: every shape follows from the request."""
        batch = self._batch([chunk])
        attention = PagedAttention(self._cache, self._config, batch.slots(), batch.prompt_segments([chunk]))
        mix = private_rows(self._config, self._fill, batch)
        hidden = self._model(
            batch.ids(), batch.positions(), attention, mix or TokenChoice(tiled=True), TiledArithmetic()
        )
        if mix is not None:
            self._tallies.private([chunk], mix.entropy)
        count = wanted_of(chunk)
        return {chunk: self._tiled_logits(hidden[chunk.length - count :])} if count else {}

    def _private_tile(self, chunks: Many[Chunk]) -> dict[Chunk, Tensor]:
        """Up to a tile of decoding rows, padded to a tile; each attends by itself."""
        batch = self._batch(chunks)
        zeros = batch.numbers([0] * (TILE - len(chunks)))
        segments = [
            prefill_segment(batch.rows_of([chunk]), batch.tables([chunk]), start=chunk.start, length=1)
            for chunk in chunks
        ]
        slots = torch.cat((batch.slots(), zeros + PADDING_BLOCK))
        attention = PagedAttention(self._cache, self._config, slots, segments)
        mix = private_rows(self._config, self._fill, batch, padding=len(zeros))
        ids = torch.cat((batch.ids(), zeros))
        positions = torch.cat((batch.positions(), zeros))
        hidden = self._model(ids, positions, attention, mix or TokenChoice(tiled=True), TiledArithmetic())
        if mix is not None:
            self._tallies.private(chunks, mix.entropy)
        logits = self._model.logits(hidden).float()
        return {chunk: logits[row : row + 1] for row, chunk in enumerate(chunks)}

    def _tiled_logits(self, hidden: Tensor) -> Tensor:
        """``[n, D]`` to float32 ``[n, vocabulary]`` in tiles, so that a row's logits do not depend on n."""
        tiles = []
        for tile in torch.split(hidden, TILE):
            padded = torch.cat((tile, tile.new_zeros(TILE - tile.shape[0], tile.shape[1])))
            tiles.append(self._model.logits(padded)[: tile.shape[0]])
        return torch.cat(tiles).float()

    def _batch(self, chunks: Many[Chunk]) -> Batch:
        return Batch(chunks, block_size=self._cache.block_size, device=self._model.device)
