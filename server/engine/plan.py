"""What one engine step does, in integers: the contract between scheduler, grouping, runner and sampler."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from server.engine.request import Sequence


@dataclass(frozen=True, eq=False)
class Chunk:
    """``length`` tokens of one sequence from position ``start`` on, whose keys and values this step computes."""

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def decodes(self) -> bool:
        """The chunk is one generated token, not part of a prompt."""
        return self.start >= len(self.sequence.prompt)

    @property
    def samples(self) -> bool:
        """The chunk ends where the sequence does, so that a next token follows from it."""
        sequence = self.sequence
        return self.start + self.length == len(sequence.token_ids) and sequence.sampling.max_tokens > 0

    @property
    def scores_prompt(self) -> bool:
        """Log probabilities of prompt tokens follow from the chunk."""
        return self.sequence.sampling.prompt_logprobs is not None and self.start < len(self.sequence.prompt)


@dataclass(frozen=True)
class Swap:
    """A sequence, by its number of arrival, and the blocks that hold its computed tokens."""

    arrival: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """``public`` chunks in order of admission; their tokens, concatenated, are the rows that groups speak of."""

    public: tuple[Chunk, ...] = ()
    private: tuple[Chunk, ...] = ()
    # Before the step, in this order:
    swap_out: tuple[Swap, ...] = ()  # copied to host memory
    zero_blocks: tuple[int, ...] = ()  # freed by private sequences, forgotten
    swap_in: tuple[Swap, ...] = ()  # copied back
    swap_drop: tuple[int, ...] = ()  # sequences whose copies are not needed any more
    reused_tokens: int = 0  # of prompts, found in the prefix cache

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.public + self.private

    @cached_property
    def sampling(self) -> tuple[Chunk, ...]:
        return tuple(chunk for chunk in self.chunks if chunk.samples)


@dataclass(frozen=True)
class Group:
    """Public rows that mix, at most G of them, completed with the reference crowd of ``position``."""

    rows: tuple[int, ...]
    position: int
