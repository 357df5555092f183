"""Which prompts wait a little so as to be computed together. Integers and a clock only.

A public prompt alone fills one group for each of its positions, and that costs as much as the same positions of G
prompts do. So while others run, prompts that have not begun may stay out of some steps until more of their tenant have
come. What that saves and what it costs are both sums of waiting: computing a prompt holds everybody up who runs beside
it, by ``delay`` in all, once for n prompts together; and each prompt of those waits for the last. At one arrival every
``gap`` seconds n prompts wait n (n - 1) gap / 2 in all, so that a prompt's share ``delay / n + (n - 1) gap / 2`` is
smallest at the least n with n (n + 1) gap >= 2 delay: so many are waited for, at most G.

Arrivals may cease. Therefore nobody waits longer than ``wait``, and nobody any more when all who wait have together
waited for ``delay``: at worst what is lost is what could have been saved (the rule of Dooly, Goldman and Scott, "TCP
dynamic acknowledgment delay", 1998). Private prompts are never held back: they share nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.engine.plan import Plan
from server.engine.request import EngineRequest, Sequence

_NEWEST_GAP = 0.2  # weight of the last gap between arrivals
_LONGEST_GAP = 10.0  # times ``wait``: longer gaps count as that, so that a silence is soon forgotten
_NEWEST_STEP = 0.05  # weight of the last step in what a step is found to take


class Gathering:
    """``wait``: seconds that a prompt may be held back, above 0. ``clock``: seconds from any beginning."""

    def __init__(self, group_size: int, wait: float, clock: Callable[[], float]) -> None:
        self._group_size, self._wait, self._clock = group_size, wait, clock
        self._arrivals: dict[str, _Arrivals] = {}  # by tenant
        self._since: dict[Sequence, float] = {}  # of those that have not begun: their first chance
        self._began = 0.0
        self._cost = _Slope()

    def arrived(self, request: EngineRequest) -> None:
        if request.privacy is None:
            self._arrivals.setdefault(request.tenant, _Arrivals()).add(self._clock(), _LONGEST_GAP * self._wait)

    def hold(self, prompts: Iterable[Sequence], others: int) -> set[Sequence]:
        """A step begins: those of ``prompts`` that stay out of it, none unless ``others`` run."""
        self._began = now = self._clock()
        fresh: defaultdict[str, list[Sequence]] = defaultdict(list)
        for sequence in prompts:
            if sequence.computed == 0 and not sequence.private:
                fresh[sequence.request.tenant].append(sequence)
        self._since = {s: self._since.get(s, now) for same in fresh.values() for s in same}
        return {s for tenant, same in fresh.items() if self._worth_it(tenant, same, others, now) for s in same}

    def step_ended(self, plan: Plan) -> None:
        """The step that ``hold`` began is computed."""
        if all(chunk.decodes for chunk in plan.private):  # private prompts take time of their own
            self._cost.add(prompt_groups(plan, self._group_size), self._clock() - self._began)

    def _worth_it(self, tenant: str, sequences: list[Sequence], others: int, now: float) -> bool:
        """Whether these should wait for one more."""
        count = len(sequences)
        waited = [now - self._since[sequence] for sequence in sequences]
        # Only positions that both have are shared with another prompt.
        delay = others * self._cost.per_group * min(len(sequence.prompt) for sequence in sequences)
        gap = self._arrivals[tenant].gap
        if gap is None or count >= self._group_size or max(waited) >= self._wait or sum(waited) >= delay:
            return False
        return one_more_is_worth_it(count, gap, delay)


def one_more_is_worth_it(count: int, gap: float, delay: float) -> bool:
    """Whether ``count + 1`` prompts computed together make less waiting a prompt than ``count``."""
    return count * (count + 1) * gap < 2 * delay


def prompt_groups(plan: Plan, group_size: int) -> int:
    """Groups that the step's public prompts fill: of one tenant, those that begin at one place advance together."""
    cohorts: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for chunk in plan.public:
        if not chunk.decodes:
            cohorts[chunk.sequence.request.tenant, chunk.start].append(chunk.length)
    return sum(-(-len(lengths) // group_size) * max(lengths) for lengths in cohorts.values())


@dataclass
class _Arrivals:
    last: float | None = None
    gap: float | None = None  # seconds between requests, smoothed; None: there was only one

    def add(self, now: float, longest: float) -> None:
        if self.last is not None:
            new = min(now - self.last, longest)
            self.gap = new if self.gap is None else self.gap + _NEWEST_GAP * (new - self.gap)
        self.last = now


class _Slope:
    """Seconds that each more group adds to a step: a straight line by least squares, old steps fading."""

    def __init__(self) -> None:
        self._groups = self._seconds = self._square = self._product = 0.0
        self._empty = True

    def add(self, groups: int, seconds: float) -> None:
        new = 1.0 if self._empty else _NEWEST_STEP
        self._empty = False
        self._groups += new * (groups - self._groups)
        self._seconds += new * (seconds - self._seconds)
        self._square += new * (groups * groups - self._square)
        self._product += new * (groups * seconds - self._product)

    @property
    def per_group(self) -> float:
        """0 while all steps were alike."""
        spread = self._square - self._groups * self._groups
        if spread <= 1e-9 * self._square:
            return 0.0
        return max(0.0, (self._product - self._groups * self._seconds) / spread)
