"""The only place of the engine that touches the model's tensors: a plan and its groups in, logits out.

Public rows of a step run together. Private rows never share a tensor shape with anyone: a chunk of a private prompt
runs alone, private decoding runs in tiles of a fixed number of rows.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from model.groups import Fill, PrivateRows, SharedGroups
from model.kv_cache import PADDING_BLOCK, PagedAttention, PagedKVCache, Segment, decode_segment, prefill_segment
from model.layers import TILE
from model.mixing import ExpertBank
from model.transformer import Transformer
from server.engine.plan import Chunk, Group, Plan


@dataclass(frozen=True)
class StepLogits:
    """Float32 logits: one row for each of ``plan.sampling``, in order, and all rows of chunks that score prompts."""

    sampling: Tensor  # [rows, vocabulary]
    prompts: tuple[tuple[Chunk, Tensor], ...]


class ModelRunner:
    def __init__(self, model: Transformer, fill: Fill, *, blocks: int, block_size: int) -> None:
        self.model, self.fill = model, fill
        self.config = model.config
        self.cache = PagedKVCache(
            model.config, blocks=blocks, block_size=block_size, dtype=model.dtype, device=model.device
        )

    @torch.inference_mode()
    def forward(self, plan: Plan, groups: tuple[Group, ...]) -> StepLogits:
        """Compute the plan's rows, write their keys and values, add to their sequences' mixing tallies."""
        self.cache.zero(list(plan.zero_blocks))
        found: dict[Chunk, Tensor] = {}
        if plan.public:
            found.update(self._public(plan.public, groups))
        decoding = [chunk for chunk in plan.private if chunk.decodes]
        for begin in range(0, len(decoding), TILE):
            found.update(self._private_tile(decoding[begin : begin + TILE]))
        for chunk in plan.private:
            if not chunk.decodes:
                found.update(self._private_prompt(chunk))
        last = [found[chunk][-1] for chunk in plan.sampling]
        sampling = torch.stack(last) if last else torch.empty(0, self.config.vocab_size)
        scored = tuple((chunk, found[chunk]) for chunk in plan.chunks if chunk.scores_prompt)
        return StepLogits(sampling, scored)

    # Public rows

    def _public(self, chunks: tuple[Chunk, ...], groups: tuple[Group, ...]) -> dict[Chunk, Tensor]:
        starts = _starts(chunks)
        shared = self._shared_groups(groups) if self.config.is_mot else None
        attention = PagedAttention(self.cache, self.config, self._slots(chunks), self._segments(chunks, starts))
        hidden = self.model(self._ids(chunks), self._positions(chunks), attention, shared or _no_mixing)
        if shared is not None:
            self._tally_shared(chunks, starts, groups, shared.entropy / self.config.n_layer)
        wanted = [(chunk, _wanted(chunk)) for chunk in chunks if _wanted(chunk)]
        if not wanted:
            return {}
        rows = [starts[chunk] + chunk.length - count + i for chunk, count in wanted for i in range(count)]
        logits = self.model.logits(hidden[self._tensor(rows)]).float()
        parts = torch.split(logits, [count for _, count in wanted])
        return {chunk: part for (chunk, _), part in zip(wanted, parts, strict=True)}

    def _shared_groups(self, groups: tuple[Group, ...]) -> SharedGroups:
        largest = max(len(group.rows) for group in groups)
        width = self.config.group_size if self.fill.kind != "none" else largest
        return SharedGroups(
            self.config,
            self.fill,
            rows=self._tensor([row for group in groups for row in group.rows]),
            places=self._tensor([n * width + i for n, group in enumerate(groups) for i in range(len(group.rows))]),
            positions=self._tensor([group.position for group in groups]),
            largest=largest,
        )

    def _segments(self, chunks: tuple[Chunk, ...], starts: dict[Chunk, int]) -> list[Segment]:
        """All decoding rows as one segment, prompt chunks of equal place and length as one each."""
        segments = []
        decoding = [chunk for chunk in chunks if chunk.decodes]
        if decoding:
            rows = self._tensor([starts[chunk] for chunk in decoding])
            segments.append(decode_segment(rows, self._tables(decoding), self._tensor([c.end for c in decoding])))
        alike: defaultdict[tuple[int, int], list[Chunk]] = defaultdict(list)
        for chunk in chunks:
            if not chunk.decodes:
                alike[chunk.start, chunk.length].append(chunk)
        for (start, length), same in alike.items():
            rows = self._tensor([starts[chunk] + i for chunk in same for i in range(length)])
            segments.append(prefill_segment(rows, self._tables(same), start=start, length=length))
        return segments

    def _tally_shared(
        self, chunks: tuple[Chunk, ...], starts: dict[Chunk, int], groups: tuple[Group, ...], entropy: Tensor
    ) -> None:
        owner = [chunk for chunk in chunks for _ in range(chunk.length)]
        filled = self.fill.kind == "reference"
        for group, value in zip(groups, entropy.tolist(), strict=True):
            live = len(group.rows)
            reference = self.config.group_size - live if filled else 0
            for row in group.rows:
                owner[row].sequence.tally.add(1, live, reference, value)

    # Private rows

    def _private_prompt(self, chunk: Chunk) -> dict[Chunk, Tensor]:
        """One chunk by itself: every shape follows from the request."""
        rows = torch.arange(chunk.length, device=self.model.device)
        segment = prefill_segment(rows, self._tables([chunk]), start=chunk.start, length=chunk.length)
        attention = PagedAttention(self.cache, self.config, self._slots([chunk]), [segment])
        mix = self._private_rows([chunk], padding=0)
        hidden = self.model(self._ids([chunk]), self._positions([chunk]), attention, mix or _no_mixing)
        self._tally_private([chunk], mix)
        count = _wanted(chunk)
        return {chunk: self._tiled_logits(hidden[chunk.length - count :])} if count else {}

    def _private_tile(self, chunks: list[Chunk]) -> dict[Chunk, Tensor]:
        """Up to a tile of decoding rows, padded to a tile; each attends by itself."""
        padding = TILE - len(chunks)
        zeros = torch.zeros(padding, dtype=torch.int64, device=self.model.device)
        segments = [
            prefill_segment(self._tensor([row]), self._tables([chunk]), start=chunk.start, length=1)
            for row, chunk in enumerate(chunks)
        ]
        slots = torch.cat((self._slots(chunks), zeros + PADDING_BLOCK))
        attention = PagedAttention(self.cache, self.config, slots, segments)
        mix = self._private_rows(chunks, padding=padding)
        ids = torch.cat((self._ids(chunks), zeros))
        positions = torch.cat((self._positions(chunks), zeros))
        hidden = self.model(ids, positions, attention, mix or _no_mixing)
        self._tally_private(chunks, mix)
        logits = self.model.logits(hidden).float()
        return {chunk: logits[row : row + 1] for row, chunk in enumerate(chunks)}

    def _private_rows(self, chunks: list[Chunk], *, padding: int) -> PrivateRows | None:
        if not self.config.is_mot:
            return None
        temperatures, skip_below, live = [], [], []
        for chunk in chunks:
            privacy = chunk.sequence.request.privacy
            assert privacy is not None, "a public chunk among the private ones"
            temperatures += [privacy.temperature] * chunk.length
            skip_below += [privacy.skip_below] * chunk.length
            live += [True] * chunk.length
        device = self.model.device
        zeros = torch.zeros(padding, dtype=torch.int64, device=device)
        return PrivateRows(
            self.config,
            self.fill,
            positions=torch.cat((self._positions(chunks), zeros)),
            temperatures=torch.tensor(temperatures + [1.0] * padding, device=device),
            skip_below=torch.tensor(skip_below + [0.0] * padding, device=device),
            live=torch.tensor(live + [False] * padding, device=device),
        )

    def _tally_private(self, chunks: list[Chunk], mix: PrivateRows | None) -> None:
        if mix is None:
            return
        reference = self.config.group_size - 1 if self.fill.kind == "reference" else 0
        entropy = (mix.entropy / self.config.n_layer).tolist()
        row = 0
        for chunk in chunks:
            spent = sum(entropy[row : row + chunk.length])
            chunk.sequence.tally.add(chunk.length, chunk.length, reference * chunk.length, spent)
            row += chunk.length

    def _tiled_logits(self, hidden: Tensor) -> Tensor:
        """``[n, D]`` to float32 ``[n, vocabulary]`` in tiles, so that a row's logits do not depend on n."""
        tiles = []
        for tile in torch.split(hidden, TILE):
            padded = torch.cat((tile, tile.new_zeros(TILE - tile.shape[0], tile.shape[1])))
            tiles.append(self.model.logits(padded)[: tile.shape[0]])
        return torch.cat(tiles).float()

    # Chunks to tensors

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.model.device)

    def _ids(self, chunks: list[Chunk] | tuple[Chunk, ...]) -> Tensor:
        return self._tensor([token for c in chunks for token in c.sequence.token_ids[c.start : c.end]])

    def _positions(self, chunks: list[Chunk] | tuple[Chunk, ...]) -> Tensor:
        return self._tensor([position for c in chunks for position in range(c.start, c.end)])

    def _slots(self, chunks: list[Chunk] | tuple[Chunk, ...]) -> Tensor:
        size = self.cache.block_size
        return self._tensor(
            [c.sequence.block_table[p // size] * size + p % size for c in chunks for p in range(c.start, c.end)]
        )

    def _tables(self, chunks: list[Chunk]) -> Tensor:
        """Block tables up to each chunk's end, padded to the longest: ``[m, b]``."""
        size = self.cache.block_size
        counts = [-(-chunk.end // size) for chunk in chunks]
        longest = max(counts)
        return torch.tensor(
            [
                chunk.sequence.block_table[:count] + [PADDING_BLOCK] * (longest - count)
                for chunk, count in zip(chunks, counts, strict=True)
            ],
            dtype=torch.int64,
            device=self.model.device,
        )


def _no_mixing(layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
    raise AssertionError("a dense model has no expert banks")


def _wanted(chunk: Chunk) -> int:
    """How many of the chunk's last rows need logits."""
    return chunk.length if chunk.scores_prompt else int(chunk.samples)


def _starts(chunks: tuple[Chunk, ...]) -> dict[Chunk, int]:
    """The row at which each chunk begins."""
    starts, row = {}, 0
    for chunk in chunks:
        starts[chunk] = row
        row += chunk.length
    return starts


def measure_balance(bank: ExpertBank, *, many: int = 32, repeats: int = 5) -> int:
    """How many groups a step can take until computing costs as much as reading the expert weights: the time of one
    group over what each further one adds."""

    def seconds(groups: int) -> float:
        mixes = bank.controller.new_zeros(bank.lin1.shape[0], groups, bank.lin1.shape[1])
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            bank.experts(mixes)
            if mixes.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    with torch.inference_mode():
        one, several = seconds(1), seconds(many)
    return max(1, min(256, round(one / max((several - one) / (many - 1), 1e-9))))
