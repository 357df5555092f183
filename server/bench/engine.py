"""The engine by itself: tokens a second at fixed concurrency, and where a step's time goes. No HTTP, no text."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from server.bench.machine import Limits, Machine, median_of
from server.engine.engine import Engine
from server.engine.request import EngineRequest, Privacy, SamplingParams, StepStats

PARTS = ("scheduling", "grouping", "model", "sampling", "results")


@dataclass(frozen=True)
class EngineLoad:
    """``concurrency`` requests of ``prompt_tokens`` that all decode ``output_tokens``, begun together; the first
    ``private_share`` of them private. ``spread``: prompts are up to so many tokens shorter, so that positions differ.
    With ``requests``, so many in all, ``concurrency`` of them under way (closed loop), private ones evenly among them;
    the first ``concurrency`` begin ``stagger`` steps after each other, as clients of a server do.
    ``temperature``: what tokens are drawn at, 0: greedy."""

    concurrency: int
    private_share: float
    prompt_tokens: int
    output_tokens: int
    spread: int = 0
    requests: int | None = None
    temperature: float = 0.8
    stagger: int = 0

    @property
    def total(self) -> int:
        return self.requests or self.concurrency

    def private(self, number: int) -> bool:
        """Whether the ``number``-th request is."""
        if self.requests is None:
            return number < round(self.concurrency * self.private_share)
        before, after = (math.floor(count * self.private_share + 0.5) for count in (number, number + 1))
        return after > before


@dataclass(frozen=True)
class EngineResult:
    """Medians over repeats. Decode rates are of steps in which nobody's prompt is computed any more and nobody has
    finished, in a closed loop of all steps; ``shares`` are of those steps' time. Where short outputs end before the
    last prompt is computed, they are of the steps in which the most decode: ``decoding`` says how many.
    ``whole_tokens_per_second``: of whole runs, prompts included, as a client of the server counts them."""

    concurrency: int
    requests: int
    private_share: float
    output_tokens_per_second: float
    whole_tokens_per_second: float
    prefill_tokens_per_second: float
    step_seconds: float
    groups_per_step: float
    decoding: float  # sequences a step
    shares: tuple[float, ...]  # one for each of ``PARTS``
    fraction_of_weight_reading: float  # of the steps a second that reading all weights once would allow
    limits: Limits  # as measured between the runs

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        shares = values.pop("shares")
        del values["limits"]
        values |= {f"{part}_share": share for part, share in zip(PARTS, shares, strict=True)}
        return values | self.limits.as_dict()


def bench_engine(
    engine: Engine,
    loads: Sequence[EngineLoad],
    machine: Machine,
    privacy: Privacy,
    *,
    repeats: int,
    progress: Callable[[float], None] = lambda _: None,
) -> Iterator[EngineResult]:
    """One result a load. Loads take turns, so that a slow minute of the machine is not one load's. Raises ValueError
    when one does not fit."""
    weights = engine.runner.model.weight_bytes
    for load in loads:
        engine.check(_requests(engine, load, privacy, 0)[0])
    first = replace(loads[0], requests=None, stagger=0)
    _run(engine, _requests(engine, first, privacy, 0), first.concurrency)  # warms caches and allocators up
    taken: list[list[list[StepStats]]] = [[] for _ in loads]
    limits: list[list[Limits]] = [[] for _ in loads]
    for repeat in range(repeats):
        for place, load in enumerate(loads):
            limits[place].append(machine.limits())
            taken[place].append(_run(engine, _requests(engine, load, privacy, repeat), load.concurrency, load.stagger))
            progress((repeat * len(loads) + place + 1) / (repeats * len(loads)))
    for load, runs, found in zip(loads, taken, limits, strict=True):
        yield _result(load, runs, median_of(found), weights)


def _requests(engine: Engine, load: EngineLoad, privacy: Privacy, seed: int) -> list[EngineRequest]:
    rng = random.Random(f"{seed}:{load}")
    params = SamplingParams(load.output_tokens, temperature=load.temperature, seed=seed, ignore_eos=True)
    requests = []
    for number in range(load.total):
        length = max(1, load.prompt_tokens - (rng.randint(0, load.spread) if load.spread else 0))
        prompt = tuple(rng.randrange(engine.config.vocab_size) for _ in range(length))
        chosen = privacy if load.private(number) else None
        requests.append(EngineRequest(f"bench-{seed}-{number}", (prompt,), params, privacy=chosen))
    return requests


def _run(engine: Engine, requests: Sequence[EngineRequest], at_once: int, stagger: int = 0) -> list[StepStats]:
    """``at_once`` of them under way, each replaced when it ends. The first ones ``stagger`` steps after each other."""
    waiting = iter(requests)
    steps: list[StepStats] = []
    begun = finished = 0
    while begun < len(requests) or not engine.idle:
        open_places = at_once if stagger == 0 else min(at_once, 1 + len(steps) // stagger)
        for request in islice(waiting, open_places + finished - begun):
            engine.add(request)
            begun += 1
        if engine.idle:  # all that were open have ended before the next place opens
            steps.append(StepStats())
            continue
        news = engine.step()
        finished += sum(delta.finish_reason is not None for _, delta in news)
        steps.append(engine.last_step)
    return [step for step in steps if step.parts]


def _steady(run: list[StepStats]) -> list[StepStats]:
    most = max(step.decode_tokens for step in run)
    return [step for step in run if step.decode_tokens == most]


def _result(load: EngineLoad, runs: list[list[StepStats]], limits: Limits, weights: int) -> EngineResult:
    decoding = [run if load.requests is not None else _steady(run) for run in runs]
    prefill = [[step for step in run if step.prefill_tokens] for run in runs]
    middle = statistics.median
    total = sum(step.seconds for run in decoding for step in run)
    shares = [sum(step.parts[n] for run in decoding for step in run) / total for n in range(len(PARTS))]
    seconds = middle(step.seconds for run in decoding for step in run)
    return EngineResult(
        load.concurrency,
        load.total,
        load.private_share,
        middle(sum(s.decode_tokens for s in run) / sum(s.seconds for s in run) for run in decoding),
        middle(load.total * load.output_tokens / sum(s.seconds for s in run) for run in runs),
        middle(sum(s.prefill_tokens for s in run) / sum(s.seconds for s in run) for run in prefill),
        seconds,
        middle(step.public_groups for run in decoding for step in run),
        middle(step.decode_tokens for run in decoding for step in run),
        tuple(shares),
        weights / limits.bandwidth / seconds,
        limits,
    )
