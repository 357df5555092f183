"""Which sequences run, with which KV blocks, and when they end. Integers only: no tensor passes here.

Every running sequence decodes one token a step, except while it waits to be aligned with others; beside that, prompts
are computed in chunks, public ones when enough of them have gathered. Those that stand at the same position advance
together, so that they can mix. Chunks of private prompts begin at multiples of a fixed size whatever else happens, so
that their shapes depend on the request alone.

A request of higher priority that finds no room makes some: later ones of lower priority are swapped out, keys and
values and all, and go on where they were when there is room again. Nothing is computed twice: what a public sequence
computed with its companions could not be had again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.admission import Capacity
from server.engine.alignment import Alignment
from server.engine.block_manager import BlockManager
from server.engine.gathering import Gathering
from server.engine.plan import Chunk, Plan, Swap
from server.engine.prefix_cache import PrefixCache
from server.engine.request import EngineRequest, Sequence, Status

PRIVATE_CHUNK = 64  # tokens of a private prompt computed at once


@dataclass(frozen=True)
class SchedulerLimits:
    max_running: int  # sequences
    prefill_tokens: int  # prompt tokens a step
    swap_blocks: int = 0  # blocks that host memory may hold; 0: nobody has to make room
    # Public prompts at one position advance together, at most so many: as many as mix. More would only wait longer for
    # their first tokens.
    cohort: int = 2**31
    private_prefill_tokens: int | None = None  # of private prompts among them; None: all may be


@dataclass
class _Waiting:
    """Requests queue as wholes: their sequences are admitted together, those that were swapped out too."""

    request: EngineRequest
    arrival: int
    sequences: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Owns the queue, the running sequences and their blocks."""

    def __init__(
        self,
        blocks: BlockManager,
        limits: SchedulerLimits,
        alignment: Alignment | None = None,
        gathering: Gathering | None = None,
    ) -> None:
        self.blocks, self.limits, self._alignment, self._gathering = blocks, limits, alignment, gathering
        self.capacity = Capacity(limits.max_running, blocks.total, blocks.block_size)
        self.prefixes = PrefixCache(blocks, PRIVATE_CHUNK)
        self._waiting: list[_Waiting] = []
        self._running: list[Sequence] = []
        self._arrivals = 0
        self._swap_out: list[Swap] = []
        self._swap_in: list[Swap] = []
        self._swap_drop: list[int] = []
        self._swapped_blocks = 0
        self._zero: list[int] = []
        self._reused = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return sum(len(entry.sequences) for entry in self._waiting)

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    @property
    def blocks_in_use(self) -> int:
        """Without those that the prefix cache would give back."""
        return self.blocks.used - self.prefixes.idle_blocks

    def check(self, request: EngineRequest) -> None:
        """Raises RequestError when the request could never be admitted. Safe to call from any thread."""
        self.capacity.check(request)

    def add(self, request: EngineRequest) -> list[Sequence]:
        """Queue a request that ``check`` has passed; returns its sequences."""
        count = len(request.prompts) * request.n
        sequences = [Sequence(request, index, self._arrivals + index) for index in range(count)]
        self._waiting.append(_Waiting(request, self._arrivals, list(sequences)))  # the caller keeps its own
        self._arrivals += count
        self._waiting.sort(key=lambda entry: (entry.request.priority, entry.arrival))
        if self._gathering is not None:
            self._gathering.arrived(request)
        return sequences

    def schedule(self) -> Plan:
        """The next step. Empty when nothing runs."""
        self._zero.extend(self.blocks.take_dirty())
        self._admit()
        held = self._alignment.hold(self._running) if self._alignment is not None else ()
        decoding = [Chunk(s, s.computed, 1) for s in self._running if not s.prefilling and s not in held]
        public, private = self._prompt_chunks(len(decoding))
        public += [chunk for chunk in decoding if not chunk.sequence.private]
        public.sort(key=lambda chunk: chunk.sequence.arrival)
        private = [chunk for chunk in decoding if chunk.sequence.private] + private
        plan = Plan(
            tuple(public), tuple(private), swap_out=tuple(self._swap_out),
            zero_blocks=tuple(self._zero), swap_in=tuple(self._swap_in), swap_drop=tuple(self._swap_drop),
            reused_tokens=self._reused,
        )  # fmt: skip
        self._reused = 0
        for done in (self._swap_out, self._zero, self._swap_in, self._swap_drop):
            done.clear()
        return plan

    def _prompt_chunks(self, decoding: int) -> tuple[list[Chunk], list[Chunk]]:
        """Of public and of private prompts, beside so many sequences that decode."""
        prompts = [s for s in self._running if s.prefilling]
        if self._gathering is not None:
            waiting = self._gathering.hold(prompts, decoding + sum(s.computed > 0 for s in prompts))
            prompts = [s for s in prompts if s not in waiting]
        budget = self.limits.prefill_tokens
        private_budget = self.limits.private_prefill_tokens or budget
        if prompts and prompts[0].private:  # the oldest goes first, whichever kind it is
            private = list(_private_chunks(prompts, min(budget, private_budget)))
            budget -= sum(chunk.length for chunk in private)
            return list(_public_chunks(prompts, budget, self.limits.cohort)), private
        public = list(_public_chunks(prompts, budget, self.limits.cohort))
        budget -= sum(chunk.length for chunk in public)
        return public, list(_private_chunks(prompts, min(budget, private_budget)))

    def _admit(self) -> None:
        """In order of priority and arrival, as long as places and blocks last; nothing overtakes."""
        while self._waiting:
            entry = self._waiting[0]
            if not self._find_room(entry) and not (self._make_room(entry) and self._find_room(entry)):
                return
            self._waiting.pop(0)
            for sequence in entry.sequences:
                self._start(sequence)

    def _find_room(self, entry: _Waiting) -> bool:
        """Whether the request fits now; then its share of the prefix cache is taken and blocks are free."""
        if len(self._running) + len(entry.sequences) > self.limits.max_running:
            return False
        for sequence in entry.sequences:
            if sequence.status is Status.WAITING:
                sequence.prefix_keys = self.prefixes.keys(sequence.request, sequence.prompt)
                sequence.shared = self.prefixes.take(sequence.prefix_keys)
        needed = sum(self._own_blocks(sequence) for sequence in entry.sequences)
        if needed > self.blocks.free_count + self.prefixes.idle_blocks:
            for sequence in entry.sequences:
                self._unshare(sequence)
            return False
        if needed > self.blocks.free_count:
            self.prefixes.reclaim(needed - self.blocks.free_count)
            self._zero.extend(self.blocks.take_dirty())
        return True

    def _own_blocks(self, sequence: Sequence) -> int:
        return self.blocks.blocks_for(sequence.longest - len(sequence.shared) * self.prefixes.unit)

    def _start(self, sequence: Sequence) -> None:
        own = self.blocks.allocate(self._own_blocks(sequence) * self.blocks.block_size)
        sequence.block_table = self.prefixes.blocks_of(sequence.shared) + own
        if sequence.status is Status.SWAPPED:
            held = self.blocks.blocks_for(sequence.computed)
            self._swap_in.append(Swap(sequence.arrival, tuple(sequence.block_table[:held])))
            self._swapped_blocks -= held
        elif sequence.shared:
            sequence.computed = len(sequence.shared) * self.prefixes.unit
            self._reused += sequence.computed
            for part in self.prefixes.parts_of(sequence.shared):
                sequence.tally.add(part)
        sequence.status = Status.RUNNING
        self._running.append(sequence)

    def _make_room(self, entry: _Waiting) -> bool:
        """Swap out later requests of lower priority, the least urgent and newest first, if that is enough."""
        needed = sum(self.blocks.blocks_for(sequence.longest) for sequence in entry.sequences)
        free, places = self.blocks.free_count + self.prefixes.idle_blocks, self.limits.max_running - self.running
        victims: list[Sequence] = []
        copied = self._swapped_blocks
        for request in self._less_urgent(entry.request.priority):
            if needed <= free and len(entry.sequences) <= places:
                break
            chosen = [sequence for sequence in self._running if sequence.request is request]
            copied += sum(self.blocks.blocks_for(sequence.computed) for sequence in chosen)
            if copied > self.limits.swap_blocks:
                return False
            victims += chosen
            # Blocks that the prefix cache owns do not come free by this.
            free += sum(self._own_blocks(sequence) for sequence in chosen)
            places += len(chosen)
        if needed > free or len(entry.sequences) > places:
            return False
        self._swap_away(victims)
        return True

    def _less_urgent(self, priority: int) -> list[EngineRequest]:
        newest: dict[int, tuple[tuple[int, int], EngineRequest]] = {}
        for sequence in self._running:
            request = sequence.request
            if request.priority > priority:
                newest[id(request)] = ((request.priority, sequence.arrival), request)
        return [request for _, request in sorted(newest.values(), key=lambda found: found[0], reverse=True)]

    def _swap_away(self, victims: list[Sequence]) -> None:
        for sequence in victims:
            held = self.blocks.blocks_for(sequence.computed)
            self._swap_out.append(Swap(sequence.arrival, tuple(sequence.block_table[:held])))
            self._swapped_blocks += held
            self._give_back(sequence)
            sequence.status = Status.SWAPPED
            entries = [entry for entry in self._waiting if entry.request is sequence.request]
            if entries:
                entries[0].sequences.append(sequence)
            else:
                self._waiting.append(_Waiting(sequence.request, sequence.arrival, [sequence]))
        self._waiting.sort(key=lambda entry: (entry.request.priority, entry.arrival))
        self._zero.extend(self.blocks.take_dirty())

    def _give_back(self, sequence: Sequence) -> None:
        """A running sequence's place and blocks."""
        self._running.remove(sequence)
        kept = set(self.prefixes.blocks_of(sequence.shared))
        own = [block for block in sequence.block_table if block not in kept]
        self.blocks.free(own, dirty=sequence.private)
        sequence.block_table = []
        self._unshare(sequence)

    def _unshare(self, sequence: Sequence) -> None:
        self.prefixes.release(sequence.shared)
        sequence.shared = []

    def advance(self, plan: Plan) -> None:
        """The step's keys and values are computed."""
        if self._alignment is not None:
            self._alignment.step_ended()
        if self._gathering is not None:
            self._gathering.step_ended(plan)
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.end
            if chunk.sequence.prefix_keys and not chunk.decodes:
                self._share(chunk)

    def _share(self, chunk: Chunk) -> None:
        """Hand a whole unit of a private prompt to the prefix cache."""
        sequence, unit = chunk.sequence, self.prefixes.unit
        number = chunk.start // unit
        if chunk.length < unit or number >= len(sequence.prefix_keys) or len(sequence.shared) != number:
            return
        first, last = (self.blocks.blocks_for(place) for place in (chunk.start, chunk.end))
        blocks = tuple(sequence.block_table[first:last])
        if self.prefixes.offer(sequence.prefix_keys[number], blocks, sequence.tally.last):
            sequence.shared.append(sequence.prefix_keys[number])

    def finish(self, sequence: Sequence) -> None:
        """Free what a sequence holds, running or waiting. Idempotent."""
        if sequence.status is Status.RUNNING:
            self._give_back(sequence)
        elif sequence.status in (Status.WAITING, Status.SWAPPED):
            if sequence.status is Status.SWAPPED:
                self._swap_drop.append(sequence.arrival)
                self._swapped_blocks -= self.blocks.blocks_for(sequence.computed)
            for entry in self._waiting:
                if sequence in entry.sequences:
                    entry.sequences.remove(sequence)
            self._waiting = [entry for entry in self._waiting if entry.sequences]
        sequence.status = Status.FINISHED

    def check_integrity(self) -> None:
        """Blocks and sequences agree. For tests."""
        self.blocks.check_integrity()
        cached = self.prefixes.all_blocks()
        shared = {id(s): set(self.prefixes.blocks_of(s.shared)) for s in self._running}
        own = [block for s in self._running for block in s.block_table if block not in shared[id(s)]]
        held = own + cached
        assert len(held) == len(set(held)) == self.blocks.used, "blocks held without a sequence, or by two"
        assert self._swapped_blocks == sum(
            self.blocks.blocks_for(s.computed) for e in self._waiting for s in e.sequences if s.status is Status.SWAPPED
        )
        for sequence in self._running:
            assert sequence.computed <= len(sequence.token_ids) <= sequence.longest


def _public_chunks(prompts: list[Sequence], budget: int, most: int) -> Iterator[Chunk]:
    """Cohorts of one tenant and one position, the one of the oldest first: all its members advance alike."""
    left = [s for s in prompts if not s.private]
    while left and budget > 0:
        head = left[0]
        cohort = [s for s in left if s.computed == head.computed and s.request.tenant == head.request.tenant]
        cohort = cohort[:most]
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
