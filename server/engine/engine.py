"""Continuous batching, one step at a time. Single-threaded; ``EngineLoop`` drives it, ``AsyncEngine`` talks to that."""

from __future__ import annotations

import time
from itertools import pairwise

from model.tokenizer import Tokenizer
from server.engine.admission import Admission
from server.engine.alignment import Alignment
from server.engine.block_manager import BlockManager
from server.engine.gathering import Gathering
from server.engine.grouping import GroupingPolicy
from server.engine.model_runner import ModelRunner
from server.engine.plan import Group, Plan
from server.engine.request import Delta, EngineRequest, Sequence, StepStats
from server.engine.results import Results
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler, SchedulerLimits


class Engine:
    """Requests in by ``add``, news out of ``step``, both in token ids (text comes along where there is a tokenizer).
    ``align_wait``: seconds that a request may be held back so as to decode beside others at its position;
    ``prompt_wait``: that its prompt may be, so as to be computed with others'."""

    def __init__(
        self,
        runner: ModelRunner,
        grouping: GroupingPolicy,
        limits: SchedulerLimits,
        tokenizer: Tokenizer | None,
        *,
        blocks: int,
        align_wait: float = 0.0,
        prompt_wait: float = 0.0,
    ) -> None:
        self.runner, self.grouping, self.tokenizer = runner, grouping, tokenizer
        self.config = runner.config
        alignment = None
        if align_wait > 0 and self.config.is_mot:
            alignment = Alignment(grouping.group_size, align_wait, time.monotonic)
        gathering = None
        if prompt_wait > 0 and self.config.is_grouped:
            gathering = Gathering(grouping.group_size, prompt_wait, time.monotonic)
        self.scheduler = Scheduler(BlockManager(blocks, runner.cache.block_size), limits, alignment, gathering)
        self.sampler = Sampler(self.config.eos_token_id, runner.kernels)
        self.results = Results(
            self.scheduler,
            self.sampler,
            tokenizer,
            temperature=self.config.temperature,
            group_fill=runner.fill.kind if self.config.is_grouped else "none",
        )
        self.admission = Admission(
            self.scheduler.capacity,
            positions=self.config.n_positions,
            vocabulary=self.config.vocab_size,
            temperature=self.config.temperature,
            end_of_text=self.config.eos_token_id,
            stop_strings=tokenizer is not None,
        )
        self._sequences: dict[str, list[Sequence]] = {}
        self.last_step = StepStats()

    def check(self, request: EngineRequest) -> None:
        """Raises RequestError naming the field when the request cannot be served. Safe to call from any thread."""
        self.admission.check(request)

    def add(self, request: EngineRequest) -> None:
        """Queue a request that ``check`` has passed."""
        self._sequences[request.request_id] = self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Forget a request, whatever its state. Idempotent."""
        for sequence in self._sequences.pop(request_id, []):
            self.scheduler.finish(sequence)
            self.results.forget(sequence)

    def abort_all(self) -> list[str]:
        """Forget everything; returns the ids of the requests that were under way."""
        ids = list(self._sequences)
        for request_id in ids:
            self.abort(request_id)
        return ids

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def step(self) -> list[tuple[str, Delta]]:
        """Compute one step; returns request ids with the news of their sequences."""
        times = [time.perf_counter()]
        plan = self.scheduler.schedule()
        times.append(time.perf_counter())
        groups = self.grouping.plan(plan) if self.config.is_grouped else ()
        times.append(time.perf_counter())
        logits = self.runner.forward(plan, groups)
        times.append(time.perf_counter())
        tokens = self.sampler.sample(logits.sampling, plan.sampling)
        self.runner.tallies.settle()
        times.append(time.perf_counter())
        news = [(s.request.request_id, delta) for s, delta in self.results.update(plan, logits, tokens)]
        self._forget_finished(news)
        times.append(time.perf_counter())
        self.results.pace.on_step(len(plan.sampling), times[-1] - times[0])
        self.last_step = _stats(plan, groups, times)
        return news

    def _forget_finished(self, news: list[tuple[str, Delta]]) -> None:
        for request_id, delta in news:
            if delta.finish_reason is not None:
                left = [s for s in self._sequences[request_id] if s.index != delta.sequence_index]
                if left:
                    self._sequences[request_id] = left
                else:
                    del self._sequences[request_id]


def _stats(plan: Plan, groups: tuple[Group, ...], times: list[float]) -> StepStats:
    return StepStats(
        seconds=times[-1] - times[0],
        parts=tuple(end - begin for begin, end in pairwise(times)),
        prefill_tokens=sum(chunk.length for chunk in plan.chunks if not chunk.decodes),
        decode_tokens=sum(chunk.decodes for chunk in plan.chunks),
        public_groups=len(groups),
        public_tokens=sum(chunk.length for chunk in plan.public),
        private_tokens=sum(chunk.length for chunk in plan.private),
        reused_tokens=plan.reused_tokens,
        swapped_out=len(plan.swap_out),
    )
