"""Which sequences run, with which KV blocks, and when they end. Integers only: no tensor passes here.

Every running sequence decodes one token a step; beside that, prompts are computed in chunks. Chunks of public prompts
that stand at the same position advance together, so that they can mix. Chunks of private prompts begin at multiples
of a fixed size whatever else happens, so that their shapes depend on the request alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.block_manager import BlockManager
from server.engine.plan import Chunk, Plan
from server.engine.request import EngineRequest, RequestError, Sequence, Status

PRIVATE_CHUNK = 64  # tokens of a private prompt computed at once


@dataclass(frozen=True)
class SchedulerLimits:
    max_running: int  # sequences
    prefill_tokens: int  # prompt tokens a step


@dataclass
class _Waiting:
    """Requests queue as wholes: their sequences are admitted together."""

    request: EngineRequest
    arrival: int
    sequences: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Owns the queue, the running sequences and their blocks."""

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits) -> None:
        self.blocks, self.limits = blocks, limits
        self._waiting: list[_Waiting] = []
        self._running: list[Sequence] = []
        self._arrivals = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return sum(len(entry.sequences) for entry in self._waiting)

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def check(self, request: EngineRequest) -> None:
        """Raises RequestError when the request could never be admitted. Safe to call from any thread."""
        count = len(request.prompts) * request.n
        if count > self.limits.max_running:
            raise RequestError(
                f"a request may ask for at most {self.limits.max_running} completions (prompts times n), not {count}",
                param="n",
            )
        if self._blocks_needed(request) > self.blocks.total:
            raise RequestError(
                "the prompts and max_tokens together need more KV cache than the server has", param="max_tokens"
            )

    def _blocks_needed(self, request: EngineRequest) -> int:
        longest = request.sampling.max_tokens
        return request.n * sum(self.blocks.blocks_for(len(prompt) + longest) for prompt in request.prompts)

    def add(self, request: EngineRequest) -> list[Sequence]:
        """Queue a request that ``check`` has passed; returns its sequences."""
        count = len(request.prompts) * request.n
        sequences = [Sequence(request, index, self._arrivals + index) for index in range(count)]
        self._waiting.append(_Waiting(request, self._arrivals, sequences))
        self._arrivals += count
        self._waiting.sort(key=lambda entry: (entry.request.priority, entry.arrival))
        return sequences

    def schedule(self) -> Plan:
        """The next step. Empty when nothing runs."""
        zero = self.blocks.take_dirty()
        self._admit()
        decoding = [Chunk(s, s.computed, 1) for s in self._running if not s.prefilling]
        public = [chunk for chunk in decoding if not chunk.sequence.private]
        private = [chunk for chunk in decoding if chunk.sequence.private]
        budget = self.limits.prefill_tokens
        prompts = [s for s in self._running if s.prefilling]
        if prompts and prompts[0].private:  # the oldest goes first, whichever kind it is
            private_chunks = list(_private_chunks(prompts, budget))
            budget -= sum(chunk.length for chunk in private_chunks)
            public_chunks = list(_public_chunks(prompts, budget))
        else:
            public_chunks = list(_public_chunks(prompts, budget))
            budget -= sum(chunk.length for chunk in public_chunks)
            private_chunks = list(_private_chunks(prompts, budget))
        public += public_chunks
        public.sort(key=lambda chunk: chunk.sequence.arrival)
        return Plan(tuple(public), tuple(private + private_chunks), zero)

    def _admit(self) -> None:
        """In order of priority and arrival, as long as places and blocks last; nothing overtakes."""
        while self._waiting:
            entry = self._waiting[0]
            if len(self._running) + len(entry.sequences) > self.limits.max_running:
                return
            if not self.blocks.can_allocate(self._blocks_needed(entry.request) * self.blocks.block_size):
                return
            self._waiting.pop(0)
            for sequence in entry.sequences:
                sequence.block_table = self.blocks.allocate(sequence.longest)
                sequence.status = Status.RUNNING
                self._running.append(sequence)

    def advance(self, plan: Plan) -> None:
        """The step's keys and values are computed."""
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.end

    def finish(self, sequence: Sequence) -> None:
        """Free what a sequence holds, running or waiting. Idempotent."""
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            self.blocks.free(sequence.block_table, dirty=sequence.private)
            sequence.block_table = []
        elif sequence.status is Status.WAITING:
            for entry in self._waiting:
                if sequence in entry.sequences:
                    entry.sequences.remove(sequence)
            self._waiting = [entry for entry in self._waiting if entry.sequences]
        sequence.status = Status.FINISHED

    def check_integrity(self) -> None:
        """Blocks and sequences agree. For tests."""
        self.blocks.check_integrity()
        held = [block for sequence in self._running for block in sequence.block_table]
        assert len(held) == len(set(held)) == self.blocks.used, "blocks held without a sequence, or by two"
        for sequence in self._running:
            assert sequence.computed <= len(sequence.token_ids) <= sequence.longest


def _public_chunks(prompts: list[Sequence], budget: int) -> Iterator[Chunk]:
    """Cohorts of one tenant and one position, the one of the oldest first: all its members advance alike."""
    left = [s for s in prompts if not s.private]
    while left and budget > 0:
        head = left[0]
        cohort = [s for s in left if s.computed == head.computed and s.request.tenant == head.request.tenant]
        length = max(1, budget // len(cohort))
        for sequence in cohort:
            chunk = Chunk(sequence, sequence.computed, min(length, len(sequence.prompt) - sequence.computed))
            budget -= chunk.length
            yield chunk
        left = [s for s in left if s not in cohort]


def _private_chunks(prompts: list[Sequence], budget: int) -> Iterator[Chunk]:
    """The oldest private prompts' next chunks, whole; at least one when there is any budget left."""
    for sequence in prompts:
        if budget <= 0:
            return
        if sequence.private:
            start = sequence.computed
            end = min(len(sequence.prompt), (start // PRIVATE_CHUNK + 1) * PRIVATE_CHUNK)
            budget -= end - start
            yield Chunk(sequence, start, end - start)
