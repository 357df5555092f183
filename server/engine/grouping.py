"""Who mixes with whom: public rows to groups of at most G. Integers only.

Prompt tokens mix at equal positions only: otherwise a sequence would see its own future through a companion. Decoding
tokens mix at the nearest positions, exactly equal ones as long as the step can afford that many groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, pairwise

from server.engine.plan import Group, Plan


@dataclass(frozen=True)
class _Row:
    tenant: str
    position: int
    row: int  # rows are numbered in order of admission


@dataclass(frozen=True)
class GroupingPolicy:
    """``window``: members of a decode group lie less than this many positions apart (1: exact); None: as far as
    ``max_groups`` makes necessary. ``max_groups``: decode groups of one step above which the nearest are merged."""

    group_size: int
    window: int | None = None
    max_groups: int = 8

    def plan(self, plan: Plan) -> tuple[Group, ...]:
        """The groups of a step; rows number the tokens of ``plan.public``. Deterministic."""
        prompt: list[_Row] = []
        decoding: list[_Row] = []
        row = 0
        for chunk in plan.public:
            rows = decoding if chunk.decodes else prompt
            tenant = chunk.sequence.request.tenant
            rows.extend(_Row(tenant, chunk.start + i, row + i) for i in range(chunk.length))
            row += chunk.length
        groups = list(self._exact(prompt))
        for _, same in groupby(sorted(decoding, key=_order), key=lambda row: row.tenant):
            groups.extend(self._merge(list(self._exact(same))))
        return tuple(groups)

    def _exact(self, rows: Iterable[_Row]) -> Iterable[Group]:
        """Groups of one tenant and one position each, cut every G rows."""
        for (_, position), same in groupby(sorted(rows, key=_order), key=lambda row: (row.tenant, row.position)):
            numbers = [row.row for row in same]
            for begin in range(0, len(numbers), self.group_size):
                yield Group(tuple(numbers[begin : begin + self.group_size]), position)

    def _merge(self, groups: list[Group]) -> list[Group]:
        """Neighbours joined, nearest first, until the step can afford the rest. ``groups`` in order of position."""
        spans = [_Span(group.rows, (group.position,) * len(group.rows)) for group in groups]
        while len(spans) > self.max_groups:
            joinable = [
                (right.positions[-1] - left.positions[0], place)
                for place, (left, right) in enumerate(pairwise(spans))
                if self._fit(left, right)
            ]
            if not joinable:
                break
            _, place = min(joinable)
            left, right = spans[place], spans[place + 1]
            spans[place : place + 2] = [_Span(left.rows + right.rows, left.positions + right.positions)]
        return [Group(span.rows, span.positions[len(span.positions) // 2]) for span in spans]

    def _fit(self, left: _Span, right: _Span) -> bool:
        spread = right.positions[-1] - left.positions[0]
        small = len(left.rows) + len(right.rows) <= self.group_size
        return small and (self.window is None or spread < self.window)


@dataclass(frozen=True)
class _Span:
    """A group in the making, in order of position; it is completed with the crowd of its median position."""

    rows: tuple[int, ...]
    positions: tuple[int, ...]


def _order(row: _Row) -> tuple[str, int, int]:
    return row.tenant, row.position, row.row
