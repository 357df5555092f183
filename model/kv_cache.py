"""Keys and values in fixed-size blocks, and causal attention over them.

Knows slots and block tables, not who owns them: which block belongs to whom is the engine's block manager's business.
Block 0 belongs to nobody: it pads block tables and takes the writes of padding rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.native import Kernels

PADDING_BLOCK = 0


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    return 2 * config.n_layer * block_size * config.n_embd * dtype.itemsize


class PagedKVCache:
    """``[layers, 2 (keys, values), blocks, block_size, heads, head_size]``, zeros at first."""

    def __init__(
        self, config: ModelConfig, *, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        shape = (config.n_layer, 2, blocks, block_size, config.n_head, config.head_size)
        self._data = (
            _zeros_when_touched(shape, dtype)
            if device.type == "cpu"
            else torch.zeros(shape, dtype=dtype, device=device)
        )
        self._layers = [(keys, values) for keys, values in self._data]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store ``keys`` and ``values [n, heads, head_size]`` at ``slots [n]`` (block * block_size + offset)."""
        data = self._data[layer].flatten(1, 2)
        data[0].index_copy_(0, slots, keys.to(data.dtype))
        data[1].index_copy_(0, slots, values.to(data.dtype))

    def read(self, layer: int, tables: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """The first ``context`` keys and values of block ``tables [m, b]``: each ``[m, context, heads, head_size]``."""
        found = self._data[layer].index_select(1, tables.flatten())  # [2, m * b, block_size, H, hd]
        both = found.view(2, tables.shape[0], -1, *found.shape[3:])[:, :, :context]
        return both[0], both[1]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values: each ``[blocks, block_size, heads, head_size]``."""
        return self._layers[layer]

    def zero(self, blocks: list[int]) -> None:
        """Forget what ``blocks`` hold."""
        if blocks:
            self._data[:, :, torch.tensor(blocks, dtype=torch.int64, device=self._data.device)] = 0

    def copy_out(self, blocks: list[int]) -> Tensor:
        """What ``blocks`` hold, in host memory: ``[layers, 2, b, block_size, heads, head_size]``."""
        return self._data[:, :, torch.tensor(blocks, dtype=torch.int64, device=self._data.device)].cpu()

    def copy_in(self, blocks: list[int], content: Tensor) -> None:
        """Put back what ``copy_out`` gave, into any blocks."""
        self._data[:, :, torch.tensor(blocks, dtype=torch.int64, device=self._data.device)] = content.to(
            self._data.device
        )

    def holds_only_zeros(self, block: int) -> bool:
        return not bool(self._data[:, :, block].any())


@dataclass(frozen=True)
class Segment:
    """Rows of m sequences that attend alike: each has ``c`` queries over the first ``context`` places of its table.

    ``rows [m * c]`` are row numbers of the batch, sequence-major; ``tables [m, b]``; ``mask`` is broadcastable to
    ``[m, heads, c, context]``, True where a query may look, or None when every query sees every key.
    """

    rows: Tensor
    tables: Tensor
    context: int
    mask: Tensor | None


def prefill_segment(rows: Tensor, tables: Tensor, *, start: int, length: int) -> Segment:
    """m sequences that each add ``length`` tokens from position ``start`` on."""
    context = start + length
    device = rows.device
    queries = torch.arange(start, context, device=device)
    mask = None if length == 1 else queries[:, None] >= torch.arange(context, device=device)[None, :]
    return Segment(rows, tables, context, mask)


def decode_segment(rows: Tensor, tables: Tensor, lengths: Tensor) -> Segment:
    """One new token in each of m sequences, which are then ``lengths [m]`` long."""
    context = int(lengths.max())
    mask = torch.arange(context, device=rows.device)[None, :] < lengths[:, None]
    return Segment(rows, tables, context, mask[:, None, None, :])


@dataclass(frozen=True)
class SingleRows:
    """Rows that the kernels attend one by one: ``rows [k]`` look at the first ``lengths [k]`` places of their
    ``tables [k, b]``."""

    rows: Tensor
    tables: Tensor
    lengths: Tensor


class PagedAttention:
    """``attend`` over a batch of rows: write their keys and values, then let each segment look at its own, and with
    ``kernels`` each of the ``single`` rows.

    A segment's result depends on the segment alone, so a private sequence that is a segment by itself is attended
    with shapes that are its own; a single row's depends on that row alone.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        config: ModelConfig,
        slots: Tensor,
        segments: list[Segment],
        single: SingleRows | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        assert single is None or kernels is not None
        self._kernels = kernels
        self._cache, self._heads, self._size = cache, config.n_head, config.head_size
        self._slots, self._segments, self._single = slots, segments, single
        # All rows, one by one, in their order: nothing to gather.
        self._only_single = single is not None and torch.equal(single.rows, torch.arange(slots.shape[0]))

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        rows = qkv.shape[0]
        split = qkv.view(rows, 3, self._heads, self._size)
        queries = split[:, 0]
        if self._kernels is not None:
            self._kernels.keep(qkv, self._slots, *self._cache.layer(layer))
        else:
            self._cache.write(layer, self._slots, split[:, 1], split[:, 2])
        if self._single is not None and self._only_single:
            return self._alone(layer, queries, self._single).view(rows, -1)
        out = torch.zeros_like(queries)
        for segment in self._segments:
            k, v = self._cache.read(layer, segment.tables, segment.context)
            q = queries[segment.rows].to(k.dtype).view(segment.tables.shape[0], -1, self._heads, self._size)
            seen = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=segment.mask
            )
            seen = seen.transpose(1, 2).reshape(-1, self._heads, self._size)
            out.index_copy_(0, segment.rows, seen.to(out.dtype))
        if self._single is not None:
            seen = self._alone(layer, queries[self._single.rows], self._single)
            out.index_copy_(0, self._single.rows, seen.to(out.dtype))
        return out.view(rows, -1)

    def _alone(self, layer: int, queries: Tensor, single: SingleRows) -> Tensor:
        k, v = self._cache.layer(layer)
        assert self._kernels is not None
        return self._kernels.attend(queries, k, v, single.tables, single.lengths)


def _zeros_when_touched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in host memory that is taken page by page as it is used: a large cache costs an idle server nothing, and
    its start no time. (torch writes its zeros.)"""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
