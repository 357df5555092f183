"""Who mixes with whom: public rows to groups of at most G. Integers only.

Prompt tokens mix at equal positions only: otherwise a sequence would see its own future through a companion. Decoding
tokens mix at equal positions too as long as the step can afford that many groups. Beyond that the line of each
tenant's tokens in order of position is cut where it costs least: among all cuts into the groups that the step can
afford, or into the fewest that G and the window allow where those are more, the one with the least expected loss,
summed over the tokens of all tenants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np

from server.engine.cuts import Line
from server.engine.plan import Group, Plan
from server.engine.spread import MIXED, SpreadLoss

_Row = tuple[str, int, int]  # tenant, position and number: in order of admission; rows stand in line in this order
_PLACE = itemgetter(0, 1)


@dataclass(frozen=True)
class GroupingPolicy:
    """``window``: members of a decode group lie less than this many positions apart (1: exact); None: as far as
    ``max_groups`` makes necessary. ``max_groups``: decode groups of one step, all tenants' together, above which
    nearby ones are merged. ``loss``: what distance costs."""

    group_size: int
    window: int | None = None
    max_groups: int = 8
    loss: SpreadLoss = MIXED

    def plan(self, plan: Plan) -> tuple[Group, ...]:
        """The groups of a step; rows number the tokens of ``plan.public``. Deterministic."""
        prompt: list[_Row] = []
        decoding: list[_Row] = []
        row = 0
        for chunk in plan.public:
            sequence, start, length = chunk.sequence, chunk.start, chunk.length
            tenant = sequence.request.tenant
            rows = decoding if chunk.decodes else prompt
            rows += [(tenant, start + i, row + i) for i in range(length)]
            row += length
        prompt.sort()
        decoding.sort()
        return (*self._exact(prompt), *self._nearest(decoding))

    def _exact(self, rows: list[_Row]) -> Iterator[Group]:
        """Groups of one tenant and one position each, cut every G rows."""
        for (_, position), same in groupby(rows, key=_PLACE):
            numbers = [number for _, _, number in same]
            for begin in range(0, len(numbers), self.group_size):
                yield Group(tuple(numbers[begin : begin + self.group_size]), position)

    def _nearest(self, rows: list[_Row]) -> list[Group]:
        exact = sum(-(-count // self.group_size) for count in Counter(map(_PLACE, rows)).values())
        if exact <= self.max_groups or self.window == 1:
            return list(self._exact(rows))
        tenants = {tenant: n for n, tenant in enumerate(dict.fromkeys(tenant for tenant, _, _ in rows))}
        line = Line.build(
            np.array([position for _, position, _ in rows]), np.array([tenants[tenant] for tenant, _, _ in rows]),
            group_size=self.group_size, window=self.window, loss=self.loss,
        )  # fmt: skip
        count = max(self.max_groups, line.fewest())
        if exact <= count:
            return list(self._exact(rows))
        groups, begin = [], 0
        for size in line.cut(count):
            members = rows[begin : begin + size]
            # Completed with the crowd of the median position.
            groups.append(Group(tuple(number for _, _, number in members), members[size // 2][1]))
            begin += size
        return groups
