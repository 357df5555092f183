"""Steps on a GPU: passes of few constant shapes, each recorded once as a CUDA graph and replayed from then on.

A step is hundreds of short kernels, and launching them takes many times as long as running them; a graph is one launch.
Rows that fill a shape up write to the padding block and enter nobody's group.

Private rows all run in tiles of one shape, prompts and decoding alike, and every expert on every row: on a GPU a row's
bits then depend neither on its neighbours nor on its place (tests/server/engine/test_cuda.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.groups import Fill, PrivateRows, SharedGroups
from model.kv_cache import PADDING_BLOCK, PagedAttention, PagedKVCache, Segment
from model.layers import WideArithmetic
from model.token_choice import TokenChoice
from model.transformer import Mix, Transformer
from server.engine.batch import Batch, Wanted
from server.engine.plain_passes import PlainPasses
from server.engine.plan import Chunk, Group, Plan
from server.engine.tallies import Tallies

_ROWS = (8, 32, 64, 128, 256, 512)
_GROUPS = (1, 4, 16, 64, 256)
_FIRST_CONTEXT = 64  # tokens; a longer one has four times as many, up to the model's
_TILE = 64  # private rows, fewer where they take more memory than this:
_LARGEST = 2**29  # bytes of any one activation


@dataclass(frozen=True)
class Shape:
    """``rows`` of a pass, each of which looks at ``blocks`` KV blocks; ``groups`` 0: private rows."""

    rows: int
    groups: int
    blocks: int


@dataclass(frozen=True)
class Found:
    """Of the live rows: float32 ``logits [rows, vocabulary]``; of the live groups or, in a private pass, rows: mixing
    entropy, summed over the layers. Valid until the next pass of its kind."""

    logits: Tensor
    entropy: Tensor

    def copied(self) -> Found:
        return Found(self.logits.clone(), self.entropy.clone())


class FixedPasses:
    """Public rows in the smallest of the shapes that holds them, private ones in tiles. On a CPU nothing is recorded:
    passes run as they are, for tests."""

    def __init__(self, model: Transformer, fill: Fill, cache: PagedKVCache, tallies: Tallies) -> None:
        self._model, self._fill, self._cache, self._tallies = model, fill, cache, tallies
        self._plain = PlainPasses(model, fill, cache, tallies)  # for more public rows than any shape holds
        config = model.config
        self._longest = -(-config.n_positions // cache.block_size)  # blocks
        self._experts = config.n_expert + config.n_shared_expert if config.has_experts else 0
        self._item = model.dtype.itemsize
        tile = _TILE
        while tile > 1 and self._bytes(Shape(tile, 0, self._longest)) > _LARGEST:
            tile //= 2
        self._tile = Shape(tile, 0, self._longest)
        self._known: dict[Shape, _Pass] = {}
        # One pool each: replaying a graph overwrites what others of its pool have answered.
        on_gpu = model.device.type == "cuda"
        self._pools = {private: torch.cuda.graph_pool_handle() if on_gpu else None for private in (False, True)}

    def __call__(self, plan: Plan, groups: Sequence[Group]) -> tuple[Wanted, Tensor]:
        """The chunks that need logits, and these, float32, in the plan's order."""
        parts: list[tuple[Wanted, Tensor]] = []
        if plan.public:
            found = self._public(plan.public, groups)
            if found is None:
                parts.append(self._plain.public(plan.public, groups))
            else:
                self._tallies.shared(plan.public, groups, found.entropy)
                parts.append(self._wanted(plan.public, found))
        if plan.private:
            found = self._private(plan.private)
            if self._model.config.is_grouped:
                self._tallies.private(plan.private, found.entropy)
            parts.append(self._wanted(plan.private, found))
        if len(parts) == 1:
            return parts[0]
        empty = torch.empty(0, self._model.config.vocab_size, device=self._model.device)
        wanted = [one for some, _ in parts for one in some]
        return wanted, torch.cat([empty, *(logits for _, logits in parts)])

    def _wanted(self, chunks: Sequence[Chunk], found: Found) -> tuple[Wanted, Tensor]:
        batch = Batch(chunks, block_size=self._cache.block_size, device=self._model.device)
        wanted, rows = batch.wanted_rows()
        return wanted, found.logits if len(rows) == batch.rows else found.logits[rows]

    def _public(self, chunks: Sequence[Chunk], groups: Sequence[Group]) -> Found | None:
        """All rows of ``chunks`` at once; None where there are more than any shape holds."""
        batch = Batch(chunks, block_size=self._cache.block_size, device=torch.device("cpu"))
        shape = self._shape(batch, len(groups))
        if shape is None:
            return None
        size = self._model.config.group_size
        places = [len(groups) * size] * batch.rows
        for number, group in enumerate(groups):
            for place, row in enumerate(group.rows):
                places[row] = number * size + place
        crowds = [group.position for group in groups]
        return self._pass(shape)(_Inputs.of(batch, places=places, crowds=crowds))

    def _private(self, chunks: Sequence[Chunk]) -> Found:
        """A chunk's rows follow each other, so that what one of them looks at was written before or beside it."""
        batch = Batch(chunks, block_size=self._cache.block_size, device=torch.device("cpu"))
        inputs, run, size = _Inputs.of(batch), self._pass(self._tile), self._tile.rows
        if batch.rows <= size:
            return run(inputs)
        tiles = [run(inputs.part(first, first + size)).copied() for first in range(0, batch.rows, size)]
        return Found(torch.cat([tile.logits for tile in tiles]), torch.cat([tile.entropy for tile in tiles]))

    def _shape(self, batch: Batch, groups: int) -> Shape | None:
        rows = next((rows for rows in _ROWS if rows >= batch.rows), None)
        count = next((count for count in _GROUPS if count >= groups), None)
        if rows is None or count is None:
            return None
        needed = -(-max(chunk.end for chunk in batch.chunks) // self._cache.block_size)
        blocks = max(1, _FIRST_CONTEXT // self._cache.block_size)
        while blocks < needed:
            blocks *= 4
        shape = Shape(rows, count, min(blocks, self._longest))
        return shape if self._bytes(shape) <= _LARGEST else None

    def _bytes(self, shape: Shape) -> int:
        """Of the largest activation: what rows look at, or what experts see."""
        config = self._model.config
        seen = 2 * shape.rows * shape.blocks * self._cache.block_size * config.n_embd
        grouped = config.is_grouped and shape.groups
        answers = self._experts * (shape.groups + 1 if grouped else shape.rows) * config.n_embd
        return self._item * max(seen, answers)

    def _pass(self, shape: Shape) -> _Pass:
        if shape not in self._known:
            self._known[shape] = _Pass(self._model, self._fill, self._cache, shape, self._pools[not shape.groups])
        return self._known[shape]


@dataclass(frozen=True)
class _Inputs:
    """Of n live rows, in host memory. ``whole`` by name: int64 columns ``[n]``, ``tables [n, b]`` and, for groups,
    ``crowds [groups]``; ``real``: float32 columns ``[n]``."""

    whole: dict[str, Tensor]
    real: dict[str, Tensor]

    @classmethod
    def of(cls, batch: Batch, *, places: list[int] | None = None, crowds: list[int] | None = None) -> _Inputs:
        chunks = batch.chunks
        lengths = batch.numbers([end for c in chunks for end in range(c.start + 1, c.end + 1)])
        tables = batch.tables(chunks).repeat_interleave(batch.numbers([c.length for c in chunks]), 0)
        whole = {"ids": batch.ids(), "positions": batch.positions(), "slots": batch.slots(), "lengths": lengths}
        whole["tables"] = tables
        if places is not None and crowds is not None:
            return cls(whole | {"places": batch.numbers(places), "crowds": batch.numbers(crowds)}, {})
        temperatures, skip_below = batch.privacy()
        return cls(whole, {"temperatures": temperatures, "skip_below": skip_below, "live": torch.ones(batch.rows)})

    @property
    def rows(self) -> int:
        return self.whole["ids"].shape[0]

    def part(self, begin: int, end: int) -> _Inputs:
        whole = {name: values[begin:end] for name, values in self.whole.items()}
        return _Inputs(whole, {name: values[begin:end] for name, values in self.real.items()})


class _Columns:
    """Named tensors of one type that lie together, on the device and, as ``padding`` has them, in host memory: one copy
    sets them all."""

    def __init__(self, padding: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self._shapes = {name: values.shape for name, values in padding.items()}
        self._padding = torch.cat([values.flatten() for values in padding.values()]).to(dtype)
        self._device = self._padding.to(device, copy=True)
        self.on_device = self._named(self._device)

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def set(self, values: dict[str, Tensor]) -> None:
        """The first so many of each; padding follows."""
        # In memory of its own: what is under way to the device must not be written over by the next pass's.
        whole = torch.empty_like(self._padding, pin_memory=self._device.is_cuda).copy_(self._padding)
        named = self._named(whole)
        for name, some in values.items():
            named[name][tuple(slice(size) for size in some.shape)] = some
        self._device.copy_(whole, non_blocking=True)


class _Pass:
    """One shape: its inputs on the device, and the pass over them."""

    def __init__(self, model: Transformer, fill: Fill, cache: PagedKVCache, shape: Shape, pool: Any) -> None:
        self._model, self._fill, self._cache, self._shape = model, fill, cache, shape
        self._device = model.device
        rows, config = shape.rows, model.config
        # What a row that fills the shape up says: token 0 at position 0 of the padding block, in a group beyond all.
        self._whole = _Columns(
            {
                "ids": torch.zeros(rows),
                "positions": torch.zeros(rows),
                "lengths": torch.ones(rows),
                "slots": torch.full((rows,), PADDING_BLOCK * cache.block_size),
                "tables": torch.full((rows, shape.blocks), PADDING_BLOCK),
                "places": torch.full((rows,), shape.groups * config.group_size),
                "crowds": torch.zeros(shape.groups + 1),
            },
            torch.int64,
            model.device,
        )
        private = {"temperatures": torch.ones(rows), "skip_below": torch.zeros(rows), "live": torch.zeros(rows)}
        self._real = _Columns(private, torch.float32, model.device)
        self._order = torch.arange(rows, device=self._device)
        self._run = self._compute if pool is None else _recorded(self._compute, pool)

    def __call__(self, inputs: _Inputs) -> Found:
        self._whole.set(inputs.whole)
        if inputs.real:
            self._real.set(inputs.real)
        logits, entropy = self._run()
        live = inputs.whole["crowds"].shape[0] if self._shape.groups else inputs.rows
        return Found(logits[: inputs.rows], entropy[:live])

    def _compute(self) -> tuple[Tensor, Tensor]:
        """Float32 logits ``[rows, vocabulary]`` and entropies ``[groups + 1 or rows]``."""
        given, config = self._whole.on_device, self._model.config
        context = self._shape.blocks * self._cache.block_size
        seen = torch.arange(context, device=self._device)[None, :] < given["lengths"][:, None]
        segment = Segment(self._order, given["tables"], context, seen[:, None, None, :])
        attention = PagedAttention(self._cache, config, given["slots"], [segment])
        mix: Mix = TokenChoice(every=True)
        entropy = torch.zeros(self._shape.groups + 1 if self._shape.groups else self._shape.rows, device=self._device)
        if config.is_grouped:
            mix = self._shared() if self._shape.groups else self._private()
            entropy = mix.entropy
        arithmetic = WideArithmetic()
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # each row and head by itself
            hidden = self._model(given["ids"], given["positions"], attention, mix, arithmetic)
        return self._model.logits(hidden, arithmetic), entropy

    def _shared(self) -> SharedGroups:
        given, config = self._whole.on_device, self._model.config
        return SharedGroups(
            config, self._fill, rows=self._order, places=given["places"], positions=given["crowds"],
            largest=config.group_size,
        )  # fmt: skip

    def _private(self) -> PrivateRows:
        given, real = self._whole.on_device, self._real.on_device
        return PrivateRows(
            self._model.config, self._fill, positions=given["positions"], temperatures=real["temperatures"],
            skip_below=real["skip_below"], live=real["live"] > 0, every=True,
        )  # fmt: skip


def _recorded(compute: Callable[[], tuple[Tensor, Tensor]], pool: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    """``compute`` as a graph: what it returns is overwritten by each replay."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set themselves up at the first calls, which no graph may hold
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = compute()
    return partial(_replayed, graph, results)


def _replayed(graph: torch.cuda.CUDAGraph, results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    graph.replay()
    return results
