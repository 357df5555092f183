"""The only place of the engine that touches the model's tensors: a plan and its groups in, logits out.

With the compiled kernels every row's bits depend on that row alone, so a step is one pass over all its rows. A GPU runs
public rows and tiles of private ones in passes of fixed shapes. Without either, public rows run together, and private
rows never share a tensor shape with anyone: a chunk of a private prompt runs alone, private decoding runs in tiles of a
fixed number of rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from model.groups import Fill, PrivateRows, SharedGroups
from model.kv_cache import (
    PADDING_BLOCK,
    PagedAttention,
    PagedKVCache,
    Segment,
    SingleRows,
    decode_segment,
    prefill_segment,
)
from model.layers import TILE, TiledArithmetic
from model.mixing import ExpertBank
from model.native import Kernels, NativeArithmetic, measurable_part
from model.token_choice import TokenChoice
from model.transformer import Mix, Transformer
from server.engine.batch import Batch, wanted_of
from server.engine.fixed_passes import FixedPasses, Found
from server.engine.plan import Chunk, Group, Plan
from server.engine.tallies import Tallies


@dataclass(frozen=True)
class StepLogits:
    """Float32 logits: one row for each of ``plan.sampling``, in order, and all rows of chunks that score prompts."""

    sampling: Tensor  # [rows, vocabulary]
    prompts: tuple[tuple[Chunk, Tensor], ...]


Wanted = list[tuple[Chunk, int]]  # chunks with rows of logits, and how many


def _of_step(wanted: Wanted, logits: Tensor) -> StepLogits:
    """``logits`` of the wanted rows, one chunk's after the other's, as a step hands them on."""
    scored: list[tuple[Chunk, Tensor]] = []
    sampling, end = [], 0
    for chunk, count in wanted:
        end += count
        if chunk.scores_prompt:
            scored.append((chunk, logits[end - count : end]))
        if chunk.samples:
            sampling.append(end - 1)
    return StepLogits(logits if len(sampling) == end else logits[sampling], tuple(scored))


class ModelRunner:
    """``kernels`` None: fixed shapes (``fixed``, by default on a GPU) or the plain path."""

    def __init__(
        self,
        model: Transformer,
        fill: Fill,
        *,
        blocks: int,
        block_size: int,
        kernels: Kernels | None = None,
        fixed: bool | None = None,
    ) -> None:
        self.model, self.fill, self.kernels = model, fill, kernels
        self.config = model.config
        self.cache = PagedKVCache(
            model.config, blocks=blocks, block_size=block_size, dtype=model.dtype, device=model.device
        )
        fixed = model.device.type == "cuda" if fixed is None else fixed
        self._fixed = FixedPasses(model, fill, self.cache) if fixed else None
        self.tallies = Tallies(model.config, filled=fill.kind == "reference")
        self._swapped: dict[int, Tensor] = {}  # by arrival: keys and values of sequences that had to make room

    @torch.inference_mode()
    def forward(self, plan: Plan, groups: tuple[Group, ...]) -> StepLogits:
        """Compute the plan's rows, write their keys and values; ``tallies`` hears what mixed with what."""
        self._prepare_blocks(plan)
        if self.kernels is not None:
            wanted, logits = self._single_pass(plan, groups, self.kernels)
        elif self._fixed is not None:
            wanted, logits = self._fixed_passes(plan, groups, self._fixed)
        else:
            wanted, logits = self._in_order(plan.chunks, self._passes(plan, groups))
        return _of_step(wanted, logits)

    def _in_order(self, chunks: Many[Chunk], found: dict[Chunk, Tensor]) -> tuple[Wanted, Tensor]:
        wanted = [(chunk, found[chunk].shape[0]) for chunk in chunks if chunk in found]
        parts = [found[chunk] for chunk, _ in wanted]
        return wanted, torch.cat(parts) if parts else torch.empty(0, self.config.vocab_size)

    def _prepare_blocks(self, plan: Plan) -> None:
        for swap in plan.swap_out:
            self._swapped[swap.arrival] = self.cache.copy_out(list(swap.blocks))
        self.cache.zero(list(plan.zero_blocks))
        for swap in plan.swap_in:
            self.cache.copy_in(list(swap.blocks), self._swapped.pop(swap.arrival))
        for arrival in plan.swap_drop:
            self._swapped.pop(arrival, None)

    # All rows at once, by the kernels

    def _single_pass(self, plan: Plan, groups: tuple[Group, ...], kernels: Kernels) -> tuple[Wanted, Tensor]:
        """Public rows first. Public prompts attend together, all other rows one by one."""
        batch = self._batch(plan.chunks)
        if not batch.rows:
            return [], torch.empty(0, self.config.vocab_size)
        prompts = [chunk for chunk in plan.public if not chunk.decodes]
        alone = [chunk for chunk in plan.public if chunk.decodes] + list(plan.private)
        single: SingleRows | None = None
        if alone:
            tables = batch.tables(alone)
            if len(alone) < sum(chunk.length for chunk in alone):
                tables = tables.repeat_interleave(batch.numbers([c.length for c in alone]), 0)
            lengths = batch.numbers([end for c in alone for end in range(c.start + 1, c.end + 1)])
            single = SingleRows(kernels, batch.rows_of(alone), tables, lengths)
        attention = PagedAttention(self.cache, self.config, batch.slots(), batch.prompt_segments(prompts), single)
        public = sum(chunk.length for chunk in plan.public)
        shared = self._shared_groups(batch, groups)
        private = self._private_rows(plan.private, padding=0)
        mix: Mix = TokenChoice(kernels)
        if self.config.is_grouped:
            mix = _Both(public, shared, private, kernels)
        arithmetic = NativeArithmetic(kernels, shared=public)
        hidden = self.model(batch.ids(), batch.positions(), attention, mix, arithmetic)
        if shared is not None:
            self.tallies.shared(plan.public, groups, shared.entropy)
        if private is not None:
            self.tallies.private(plan.private, private.entropy)
        wanted, rows = batch.wanted_rows()
        public = sum(count for chunk, count in wanted if not chunk.sequence.private)
        if len(rows) < batch.rows:
            hidden = hidden[rows]
        return wanted, self.model.logits(hidden, NativeArithmetic(kernels, shared=public))

    # Public rows and tiles of private ones, in fixed shapes

    def _fixed_passes(self, plan: Plan, groups: tuple[Group, ...], fixed: FixedPasses) -> tuple[Wanted, Tensor]:
        wanted: Wanted = []
        parts: list[Tensor] = []

        def take(chunks: Many[Chunk], found: Found) -> None:
            some, rows = self._batch(chunks).wanted_rows()
            wanted.extend(some)
            parts.append(found.logits if len(rows) == found.logits.shape[0] else found.logits[rows])

        if plan.public:
            found = fixed.public(plan.public, groups)
            if found is not None:
                self.tallies.shared(plan.public, groups, found.entropy)
                take(plan.public, found)
            else:
                some, logits = self._in_order(plan.public, self._public(plan.public, groups))
                wanted.extend(some)
                parts.append(logits.to(self.model.device))
        if plan.private:
            found = fixed.private(plan.private)
            if self.config.is_grouped:
                self.tallies.private(plan.private, found.entropy)
            take(plan.private, found)
        return wanted, parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    # Public rows

    def _passes(self, plan: Plan, groups: tuple[Group, ...]) -> dict[Chunk, Tensor]:
        """Public rows together, private ones in shapes of their own."""
        found: dict[Chunk, Tensor] = {}
        if plan.public:
            found.update(self._public(plan.public, groups))
        decoding = [chunk for chunk in plan.private if chunk.decodes]
        for begin in range(0, len(decoding), TILE):
            found.update(self._private_tile(decoding[begin : begin + TILE]))
        for chunk in plan.private:
            if not chunk.decodes:
                found.update(self._private_prompt(chunk))
        return found

    def _public(self, chunks: tuple[Chunk, ...], groups: tuple[Group, ...]) -> dict[Chunk, Tensor]:
        batch = self._batch(chunks)
        shared = self._shared_groups(batch, groups)
        attention = PagedAttention(self.cache, self.config, batch.slots(), self._segments(batch))
        hidden = self.model(batch.ids(), batch.positions(), attention, shared or TokenChoice())
        if shared is not None:
            self.tallies.shared(chunks, groups, shared.entropy)
        wanted, rows = batch.wanted_rows()
        if not wanted:
            return {}
        logits = self.model.logits(hidden[rows]).float()
        parts = torch.split(logits, [count for _, count in wanted])
        return {chunk: part for (chunk, _), part in zip(wanted, parts, strict=True)}

    def _shared_groups(self, batch: Batch, groups: tuple[Group, ...]) -> SharedGroups | None:
        if not groups:
            return None
        largest = max(len(group.rows) for group in groups)
        width = self.config.group_size if self.fill.kind != "none" else largest
        return SharedGroups(
            self.config,
            self.fill,
            rows=batch.numbers([row for group in groups for row in group.rows]),
            places=batch.numbers([n * width + i for n, group in enumerate(groups) for i in range(len(group.rows))]),
            positions=batch.numbers([group.position for group in groups]),
            largest=largest,
            kernels=self.kernels,
        )

    def _segments(self, batch: Batch) -> list[Segment]:
        """All decoding rows as one segment, prompt chunks of equal place and length as one each."""
        segments = []
        decoding = [chunk for chunk in batch.chunks if chunk.decodes]
        if decoding:
            ends = batch.numbers([chunk.end for chunk in decoding])
            segments.append(decode_segment(batch.rows_of(decoding), batch.tables(decoding), ends))
        return segments + batch.prompt_segments([chunk for chunk in batch.chunks if not chunk.decodes])

    # Private rows

    def _private_prompt(self, chunk: Chunk) -> dict[Chunk, Tensor]:
        """One chunk by itself: every shape follows from the request."""
        batch = self._batch([chunk])
        attention = PagedAttention(self.cache, self.config, batch.slots(), batch.prompt_segments([chunk]))
        mix = self._private_rows([chunk], padding=0)
        hidden = self.model(
            batch.ids(), batch.positions(), attention, mix or TokenChoice(tiled=True), TiledArithmetic()
        )
        if mix is not None:
            self.tallies.private([chunk], mix.entropy)
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
        attention = PagedAttention(self.cache, self.config, slots, segments)
        mix = self._private_rows(chunks, padding=len(zeros))
        ids = torch.cat((batch.ids(), zeros))
        positions = torch.cat((batch.positions(), zeros))
        hidden = self.model(ids, positions, attention, mix or TokenChoice(tiled=True), TiledArithmetic())
        if mix is not None:
            self.tallies.private(chunks, mix.entropy)
        logits = self.model.logits(hidden).float()
        return {chunk: logits[row : row + 1] for row, chunk in enumerate(chunks)}

    def _private_rows(self, chunks: Many[Chunk], *, padding: int) -> PrivateRows | None:
        if not self.config.is_grouped or not chunks:
            return None
        temperatures, skip_below, live = [], [], []
        for chunk in chunks:
            privacy = chunk.sequence.request.privacy
            assert privacy is not None, "a public chunk among the private ones"
            temperatures += [privacy.temperature] * chunk.length
            skip_below += [privacy.skip_below] * chunk.length
            live += [True] * chunk.length
        batch, device = self._batch(chunks), self.model.device
        return PrivateRows(
            self.config,
            self.fill,
            positions=torch.cat((batch.positions(), batch.numbers([0] * padding))),
            temperatures=torch.tensor(temperatures + [1.0] * padding, device=device),
            skip_below=torch.tensor(skip_below + [0.0] * padding, device=device),
            live=torch.tensor(live + [False] * padding, device=device),
            kernels=self.kernels,
        )

    def _tiled_logits(self, hidden: Tensor) -> Tensor:
        """``[n, D]`` to float32 ``[n, vocabulary]`` in tiles, so that a row's logits do not depend on n."""
        tiles = []
        for tile in torch.split(hidden, TILE):
            padded = torch.cat((tile, tile.new_zeros(TILE - tile.shape[0], tile.shape[1])))
            tiles.append(self.model.logits(padded)[: tile.shape[0]])
        return torch.cat(tiles).float()

    def _batch(self, chunks: Many[Chunk]) -> Batch:
        return Batch(chunks, block_size=self.cache.block_size, device=self.model.device)


@dataclass(frozen=True)
class _Both:
    """``mix`` for a batch whose first ``public`` rows are public, the rest private. Few shared groups go through the
    experts together with the private rows: the weights are read once."""

    public: int
    shared: SharedGroups | None
    private: PrivateRows | None
    kernels: Kernels

    def __call__(self, layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
        public, private = x[: self.public], x[self.public :]
        if self.private is None:
            return self.shared(layer, bank, public) if self.shared is not None else public
        if self.shared is None:
            return self.private(layer, bank, private)
        mixes, emit = self.shared.mix(layer, bank, public)
        together = self.kernels.prefers(mixes.shape[1], bank)
        own, outputs = self.private.beside(layer, bank, private, mixes if together else mixes[:, :0])
        if not together:
            outputs = bank.experts(mixes.to(bank.controller.dtype))
        return torch.cat((self.shared.redistribute(outputs, emit, public), own))


def measure_balance(bank: ExpertBank, *, many: int = 32, repeats: int = 5, kernels: Kernels | None = None) -> int:
    """How many groups a step can take until computing costs as much as reading the expert weights: the time of one
    group over what each further one adds. The fastest of several runs counts: a busy moment only ever adds."""

    def seconds(groups: int) -> float:
        mixes = bank.controller.new_zeros(bank.lin1.shape[0], groups, bank.lin1.shape[1])
        began = time.perf_counter()
        if kernels is not None and kernels.prefers(groups, bank):
            kernels.bank(mixes, bank)
        else:
            bank.experts(mixes)
        if mixes.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    bank = measurable_part(bank)
    with torch.inference_mode():
        taken = [(seconds(1), seconds(many)) for _ in range(repeats + 1)][1:]
    one, several = min(first for first, _ in taken), min(second for _, second in taken)
    return max(1, min(256, round(one / max((several - one) / (many - 1), 1e-9))))
