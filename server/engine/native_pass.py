"""A step by the compiled kernels: every row's bits depend on that row alone, so it is one pass over all its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.groups import Fill, PrivateRows, SharedGroups
from model.kv_cache import PagedAttention, PagedKVCache, SingleRows
from model.memory import Workspace
from model.mixing import ExpertBank
from model.native import Kernels
from model.native.arithmetic import NativeArithmetic
from model.native.decoder import Company, NativeDecoder
from model.token_choice import TokenChoice
from model.transformer import Mix, Transformer
from server.engine.batch import Batch, Wanted
from server.engine.mixing_rows import private_rows, shared_groups
from server.engine.plan import Chunk, Group, Plan
from server.engine.tallies import Tallies

_SHORT = 256  # positions: prompts within attend row by row in no more time than together


class NativePass:
    def __init__(self, model: Transformer, fill: Fill, cache: PagedKVCache, tallies: Tallies, kernels: Kernels) -> None:
        self._model, self._fill, self._cache, self._tallies = model, fill, cache, tallies
        self._config, self._kernels = model.config, kernels
        self._workspace = Workspace()
        self._decoder = NativeDecoder(model, fill, cache, kernels) if NativeDecoder.knows(model) else None

    def __call__(self, plan: Plan, groups: tuple[Group, ...]) -> tuple[Wanted, Tensor]:
        """Public rows first."""
        batch = self._batch(plan.chunks)
        if not batch.rows:
            return [], torch.empty(0, self._config.vocab_size)
        public = sum(chunk.length for chunk in plan.public)
        short = all(chunk.decodes or chunk.end <= _SHORT for chunk in plan.public)
        decoder = self._decoder if short else None
        if decoder is not None and decoder.prefers(public, len(groups)):
            hidden = self._whole(decoder, batch, plan, groups)
        else:
            hidden = self._by_parts(batch, plan, groups)
        wanted, rows = batch.wanted_rows()
        public = sum(count for chunk, count in wanted if not chunk.sequence.private)
        if len(rows) < batch.rows:
            hidden = hidden[rows]
        return wanted, self._model.logits(hidden, NativeArithmetic(self._kernels, shared=public))

    def _whole(self, decoder: NativeDecoder, batch: Batch, plan: Plan, groups: tuple[Group, ...]) -> Tensor:
        """Hidden states of rows that all attend one by one."""
        size = self._config.group_size
        company = Company.of(
            [[*group.rows, *[-1] * (size - len(group.rows))] for group in groups],
            [group.position for group in groups],
            *self._batch(plan.private).privacy(),
        )
        single = self._single(batch, list(plan.chunks))
        hidden = decoder(batch.ids(), batch.positions(), batch.slots(), single, company)
        if self._config.is_grouped and plan.public:
            self._tallies.shared(plan.public, groups, company.shared_entropy)
        if self._config.is_grouped and plan.private:
            self._tallies.private(plan.private, company.private_entropy)
        return hidden

    def _by_parts(self, batch: Batch, plan: Plan, groups: tuple[Group, ...]) -> Tensor:
        """Hidden states. Public prompts attend together, as long ones do in less time, all other rows one by one."""
        kernels = self._kernels
        prompts = [chunk for chunk in plan.public if not chunk.decodes]
        alone = [chunk for chunk in plan.public if chunk.decodes] + list(plan.private)
        single = self._single(batch, alone) if alone else None
        segments = batch.prompt_segments(prompts)
        attention = PagedAttention(self._cache, self._config, batch.slots(), segments, single, kernels)
        public = sum(chunk.length for chunk in plan.public)
        shared = shared_groups(self._config, self._fill, batch, groups, kernels, self._workspace)
        private = private_rows(self._config, self._fill, self._batch(plan.private), kernels=kernels)
        mix: Mix = TokenChoice(kernels)
        if self._config.is_grouped:
            mix = _Both(public, shared, private, kernels, self._workspace)
        arithmetic = NativeArithmetic(kernels, shared=public)
        hidden: Tensor = self._model(batch.ids(), batch.positions(), attention, mix, arithmetic)
        if shared is not None:
            self._tallies.shared(plan.public, groups, shared.entropy)
        if private is not None:
            self._tallies.private(plan.private, private.entropy)
        return hidden

    def _single(self, batch: Batch, alone: list[Chunk]) -> SingleRows:
        tables = batch.tables(alone)
        if len(alone) < sum(chunk.length for chunk in alone):
            tables = tables.repeat_interleave(batch.numbers([c.length for c in alone]), 0)
        lengths = batch.numbers([end for c in alone for end in range(c.start + 1, c.end + 1)])
        return SingleRows(batch.rows_of(alone), tables, lengths)

    def _batch(self, chunks: tuple[Chunk, ...]) -> Batch:
        return Batch(chunks, block_size=self._cache.block_size, device=self._model.device)


@dataclass(frozen=True)
class _Both:
    """``mix`` for a batch whose first ``public`` rows are public, the rest private. Few shared groups go through the
    experts together with the private rows: the weights are read once."""

    public: int
    shared: SharedGroups | None
    private: PrivateRows | None
    kernels: Kernels
    workspace: Workspace

    def __call__(self, layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
        public, private = x[: self.public], x[self.public :]
        if self.private is None:
            return self.shared(layer, bank, public) if self.shared is not None else public
        if self.shared is None:
            return self.private(layer, bank, private)
        mixes, emit = self.shared.mix(layer, bank, public)
        together = self.kernels.prefers(mixes.shape[1], bank)
        own, outputs = self.private.beside(layer, bank, private, mixes if together else mixes[:, :0], self.workspace)
        if not together:
            outputs = bank.experts(mixes.to(bank.controller.dtype))
        return torch.cat((self.shared.redistribute(outputs, emit, public), own))
