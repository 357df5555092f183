"""Grouping policies against each other: the real scheduler and the real policy on a trace of arrivals, in virtual time.

No tensors: every sequence decodes as many tokens as the trace says, and a step takes what a ``StepCost`` says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from server.bench.step_cost import StepCost
from server.bench.trace import Arrival
from server.engine.alignment import Alignment
from server.engine.block_manager import BlockManager
from server.engine.gathering import Gathering
from server.engine.grouping import GroupingPolicy
from server.engine.plan import Group, Plan
from server.engine.request import EngineRequest, RequestError, SamplingParams
from server.engine.scheduler import Scheduler, SchedulerLimits

_BLOCK = 16  # tokens


@dataclass(frozen=True)
class GroupingResult:
    """``live_members``, ``position_spread`` (of a token's group), ``lone_share`` and ``expected_loss`` (nats above
    exact position) are means over decoded tokens, ``groups_per_step`` and ``step_seconds`` over steps that decode.
    Tokens a second are of the time in which anything ran; ``first_token_seconds`` and ``request_seconds``, from arrival
    to first token and to end, are means over requests."""

    policy: str
    live_members: float
    groups_per_step: float
    position_spread: float
    lone_share: float
    expected_loss: float
    output_tokens_per_second: float
    step_seconds: float
    first_token_seconds: float
    request_seconds: float
    requests: int
    steps: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def policies(group_size: int, windows: Sequence[int], adaptive: GroupingPolicy) -> dict[str, GroupingPolicy]:
    """By name: equal positions only; as few groups as a window allows; as few as G allows; ``adaptive``, whose loss
    all of them go by."""
    named = {"exact": GroupingPolicy(group_size, 1, 1, adaptive.loss)}
    named |= {f"window {window}": GroupingPolicy(group_size, window, 1, adaptive.loss) for window in windows}
    return named | {"any": GroupingPolicy(group_size, None, 1, adaptive.loss), "adaptive": adaptive}


class Replay:
    """One policy on one trace. ``align_wait`` and ``prompt_wait`` in seconds. Raises ValueError when a request does not
    fit."""

    def __init__(
        self,
        trace: Sequence[Arrival],
        policy: GroupingPolicy,
        cost: StepCost,
        *,
        max_running: int = 256,
        prefill_tokens: int = 192,
        align_wait: float = 0.0,
        prompt_wait: float = 0.0,
    ) -> None:
        self._policy, self._cost = policy, cost
        self._now = self._busy = 0.0
        longest = max(arrival.prompt_tokens + arrival.output_tokens for arrival in trace)
        blocks = BlockManager(max_running * -(-longest // _BLOCK) + 1, _BLOCK)  # memory never is what holds requests up
        alignment = Alignment(policy.group_size, align_wait, lambda: self._now) if align_wait > 0 else None
        gathering = Gathering(policy.group_size, prompt_wait, lambda: self._now) if prompt_wait > 0 else None
        limits = SchedulerLimits(max_running, prefill_tokens, cohort=policy.group_size)
        self._scheduler = Scheduler(blocks, limits, alignment, gathering)
        self._coming = deque(sorted(trace, key=lambda arrival: arrival.seconds))
        self._arrived: dict[str, float] = {}
        self._first_token_seconds = self._request_seconds = 0.0
        self._steps = self._decoding_steps = self._groups = self._tokens = 0
        self._decoding_seconds = 0.0
        self._rows = self._members = self._spread = self._lone = 0
        self._loss = 0.0

    def run(self, name: str, progress: Callable[[float], None] = lambda _: None) -> GroupingResult:
        """Once; ``progress`` gets the share of requests that have arrived."""
        requests = len(self._coming)
        while self._coming or not self._scheduler.idle:
            self._take_arrivals()
            self._step()
            progress(len(self._arrived) / requests)
        rows, steps = max(self._rows, 1), max(self._decoding_steps, 1)
        return GroupingResult(
            name, self._members / rows, self._groups / steps, self._spread / rows, self._lone / rows,
            self._loss / rows, self._tokens / self._busy, self._decoding_seconds / steps,
            self._first_token_seconds / requests, self._request_seconds / requests, requests, self._steps,
        )  # fmt: skip

    def _take_arrivals(self) -> None:
        if self._scheduler.idle:
            self._now = max(self._now, self._coming[0].seconds)
        while self._coming and self._coming[0].seconds <= self._now:
            arrival = self._coming.popleft()
            name, sampling = f"trace-{len(self._arrived)}", SamplingParams(max_tokens=arrival.output_tokens, seed=0)
            request = EngineRequest(name, ((0,) * arrival.prompt_tokens,), sampling, tenant=arrival.tenant)
            try:
                self._scheduler.check(request)
            except RequestError as error:
                raise ValueError(f"trace: {error}") from None
            self._scheduler.add(request)
            self._arrived[name] = arrival.seconds

    def _step(self) -> None:
        plan = self._scheduler.schedule()
        groups = self._policy.plan(plan)
        seconds = self._cost.of(len(groups), sum(chunk.length for chunk in plan.public))
        self._now += seconds
        self._busy += seconds
        self._steps += 1
        self._count(plan, groups, seconds)
        self._scheduler.advance(plan)
        for chunk in plan.sampling:
            sequence = chunk.sequence
            sequence.token_ids.append(0)
            self._tokens += 1
            seconds = self._now - self._arrived[sequence.request.request_id]
            if sequence.output_length == 1:
                self._first_token_seconds += seconds
            if sequence.output_length >= sequence.sampling.max_tokens:
                self._scheduler.finish(sequence)
                self._request_seconds += seconds

    def _count(self, plan: Plan, groups: tuple[Group, ...], seconds: float) -> None:
        """Decode groups only."""
        places = [place if chunk.decodes else None for chunk in plan.public for place in range(chunk.start, chunk.end)]
        decoding = [
            positions
            for group in groups
            if (positions := [place for row in group.rows if (place := places[row]) is not None])
        ]
        if not decoding:
            return
        self._decoding_steps += 1
        self._decoding_seconds += seconds
        self._groups += len(decoding)
        for positions in decoding:
            size, spread = len(positions), max(positions) - min(positions)
            self._rows += size
            self._members += size * size
            self._spread += size * spread
            self._lone += size == 1
            self._loss += size * self._policy.loss.of(spread)
