"""The real scheduler in virtual time: a step takes what it is said to, and tokens are all 0."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from server.engine.plan import Plan
from server.engine.request import EngineRequest, Privacy, SamplingParams, Sequence, Status
from server.engine.scheduler import Scheduler

# Steps until it comes, prompt, output, n, tenant, whether it is private.
Coming = tuple[int, int, int, int, str, bool]


class World:
    """``scheduler`` gets the clock; ``seconds`` says what a step takes."""

    def __init__(self, scheduler: Callable[[Callable[[], float]], Scheduler], seconds: Callable[[Plan], float]) -> None:
        self.now = 0.0
        self.sequences: list[Sequence] = []
        self.scheduler = scheduler(lambda: self.now)
        self._seconds = seconds

    def add(self, prompt: int, output: int, *, n: int = 1, tenant: str = "", private: bool = False) -> list[Sequence]:
        privacy = Privacy(0.0, 0.0) if private else None
        name, sampling = f"r{len(self.sequences)}", SamplingParams(max_tokens=output, seed=0)
        added = self.scheduler.add(EngineRequest(name, ((0,) * prompt,), sampling, n, privacy, tenant))
        self.sequences += added
        return added

    def add_due(self, coming: list[Coming], number: int) -> None:
        """Those of ``coming``, in order, that come until step ``number``; they are taken from it."""
        while coming and coming[0][0] <= number:
            _, prompt, output, n, tenant, private = coming.pop(0)
            self.add(prompt, output, n=n, tenant=tenant, private=private)

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        self.now += self._seconds(plan)
        self.scheduler.advance(plan)
        for chunk in plan.sampling:
            chunk.sequence.token_ids.append(0)
            if chunk.sequence.output_length >= chunk.sequence.sampling.max_tokens:
                self.scheduler.finish(chunk.sequence)
        self.scheduler.check_integrity()
        return plan

    def finished(self) -> bool:
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)


def arrivals(*, steps: int, prompt: int, n: int, most: int) -> st.SearchStrategy[list[Coming]]:
    """At most so many of each."""
    one = st.tuples(
        st.integers(0, steps), st.integers(1, prompt), st.integers(1, 16), st.integers(1, n),
        st.sampled_from(["", "b"]), st.booleans(),
    )  # fmt: skip
    return st.lists(one, min_size=1, max_size=most)
