"""Which requests wait a little before they decode, so as to mix at equal positions. Integers and a clock only.

A public request whose prompt is computed, and whose first token is sampled, may stay out of the next steps while others
of its tenant decode at a position below its own and leave room in their group: when they have reached it, it goes on as
one of them.

Nobody starves. Each step decides anew, and a request stays out of a step only if (1) some request that decodes in
that very step is on the way to its position, so that every step takes one position off the way, and (2) at the
measured rate of steps the way ends within the wait, which counts from the request's first chance to decode; so it
never stays out of a step that begins later than that. Private requests are never held back: alone, they wait for
nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from server.engine.request import Sequence

_Crowds = defaultdict[tuple[str, int], list[Sequence]]  # that decode in this step, by tenant and position
_NEWEST = 0.2  # weight of the last step in the measured step time


class Alignment:
    """``wait``: seconds that a request may be held back, 0: never. ``clock``: seconds from any beginning."""

    def __init__(self, group_size: int, wait: float, clock: Callable[[], float]) -> None:
        self._group_size, self._wait, self._clock = group_size, wait, clock
        self._began: float | None = None
        self._step: float | None = None  # seconds of a step, smoothed

    def hold(self, running: Iterable[Sequence]) -> set[Sequence]:
        """A step begins: those of ``running`` that stay out of it. Sequences of one request that stand at the same
        position stay together."""
        self._began = now = self._clock()
        if self._wait <= 0:
            return set()
        ready: defaultdict[tuple[int, str], list[Sequence]] = defaultdict(list)
        crowds: _Crowds = defaultdict(list)
        for sequence in running:
            if sequence.private or sequence.prefilling:
                continue
            if sequence.computed > len(sequence.prompt):
                crowds[sequence.request.tenant, sequence.computed].append(sequence)
                continue
            ready[sequence.computed, sequence.request.request_id].append(sequence)
            if sequence.ready_since is None:
                sequence.ready_since = now
        held: set[Sequence] = set()
        promised: defaultdict[tuple[str, int], int] = defaultdict(int)  # places in crowds
        # From low positions to high: who begins now is a crowd for those further on.
        for (position, _), sequences in sorted(ready.items(), key=lambda entry: entry[0][0]):
            tenant = sequences[0].request.tenant
            since = min(now if s.ready_since is None else s.ready_since for s in sequences)
            crowd = self._crowd_for((tenant, position), len(sequences), since + self._wait - now, crowds, promised)
            if crowd[1] < position:
                promised[crowd] += len(sequences)
                held.update(sequences)
            else:
                crowds[tenant, position] += sequences
        return held

    def step_ended(self) -> None:
        """The step that ``hold`` began is computed."""
        if self._began is not None:
            seconds = self._clock() - self._began
            self._step = seconds if self._step is None else self._step + _NEWEST * (seconds - self._step)

    def _crowd_for(
        self, place: tuple[str, int], count: int, left: float, crowds: _Crowds, promised: dict[tuple[str, int], int]
    ) -> tuple[str, int]:
        """The nearest crowd that is at ``place``, or comes there in the time left, and then has ``count`` places;
        ``place`` itself when there is none."""
        tenant, position = place
        if self._step is None or left <= 0:
            return place
        within = position if self._step * position <= left else int(left / self._step)
        for steps in range(within + 1):
            crowd = (tenant, position - steps)
            # Those that end on the way do not count; of a crowd of more than G, the last group has the room.
            coming = sum(sequence.longest > position for sequence in crowds.get(crowd, ()))
            if coming and -(coming + promised.get(crowd, 0)) % self._group_size >= count:
                return crowd
        return place
