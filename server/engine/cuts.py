"""The best cuts of a sorted line of rows into groups: a dynamic programme over whole numbers. Knows no requests.

Rows stand in order of position, one tenant's after the other's. A group is a stretch of at most G neighbours of one
tenant, less than ``window`` positions apart. What it costs is its size times the loss at its spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from server.engine.spread import SpreadLoss

_Integers = NDArray[np.int64]
_FAR = 2**40  # more than any sum of costs, and still one after being added a few thousand times


@dataclass(frozen=True)
class Line:
    """``costs[g - 1, i]``: of the group of g rows that ends with row i; ``longest[i]``: rows of the longest group that
    may end there, shorter ones may as well."""

    costs: _Integers  # [G, rows]
    longest: _Integers  # [rows]

    @staticmethod
    def build(
        positions: _Integers, tenants: _Integers, *, group_size: int, window: int | None, loss: SpreadLoss
    ) -> Line:
        """``positions [rows]`` ascending within each of ``tenants [rows]``, numbers that ascend too."""
        rows, span = len(positions), int(positions.max() - positions.min())
        limit = span if window is None else min(span, window - 1)
        # Tenants, and what stands before the first row, are further away than anything within one.
        apart = positions + tenants * (2 * span + 2)
        padded = np.concatenate((np.full(group_size - 1, apart[0] - span - 1, np.int64), apart))
        spreads = np.minimum(apart - _backwards(padded, group_size, rows), limit + 1)
        table = loss.costs(np.arange(limit + 2))
        table[limit + 1] = _FAR
        sizes = np.arange(1, group_size + 1)[:, None]
        return Line(table[spreads] * sizes, np.asarray((spreads <= limit).sum(axis=0), dtype=np.int64))

    def fewest(self) -> int:
        """Groups that are needed at least. Every part of a group is one, so taking the longest each time is best."""
        longest, left, count = self.longest.tolist(), len(self.longest), 0
        while left:
            left -= longest[left - 1]
            count += 1
        return count

    def cut(self, count: int) -> list[int]:
        """Sizes of ``count`` groups, in order, that together cost least. ``count`` from ``fewest`` to all rows."""
        size, rows = self.costs.shape
        # best[k, size - 1 + i]: the first i rows in k groups.
        best = np.full((count + 1, size + rows), _FAR, np.int64)
        best[0, size - 1] = 0
        before = _backwards(best, size, rows)
        room = np.empty((size, rows), np.int64)
        for k in range(1, count + 1):
            # Only so many first rows that the other groups can hold the rest, and have a row each.
            low, high = max(k, rows - (count - k) * size), min(k * size, rows - (count - k))
            part = room[:, : high - low + 1]
            np.add(before[k - 1, :, low - 1 : high], self.costs[:, low - 1 : high], out=part)
            part.min(axis=0, out=best[k, size + low - 1 : size + high])
        sizes, left = [], rows
        for k in range(count, 0, -1):
            sizes.append(int((before[k - 1, :, left - 1] + self.costs[:, left - 1]).argmin()) + 1)
            left -= sizes[-1]
        assert left == 0, "no such number of groups"
        return sizes[::-1]


def _backwards(padded: _Integers, size: int, rows: int) -> _Integers:
    """A view ``[..., size, rows]`` whose row g is ``padded [..., size - 1 + rows]`` moved g places to the right."""
    step = padded.strides[-1]
    shape, strides = (*padded.shape[:-1], size, rows), (*padded.strides[:-1], -step, step)
    return as_strided(padded[..., size - 1 :], shape, strides, writeable=False)
