"""The engine behind the event loop: requests in from coroutines, deltas out to them, one thread stepping.

This is the engine's only face towards the server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from model.tokenizer import Tokenizer
from server.engine.request import Delta, EngineRequest, Privacy


@dataclass(frozen=True)
class EngineInfo:
    """What a server may say about the engine behind it."""

    model_type: str
    vocab_size: int
    max_positions: int  # prompt and completion together
    group_size: int  # 1 for a dense model
    temperature: float  # the checkpoint's T
    default_privacy: Privacy  # what ``private`` means when the request names no temperature
    group_fill: str  # "reference", "zeros" or "none"; "zeros" also when the checkpoint has no crowd
    reference_fingerprint: str | None
    device: str
    dtype: str
    parameters: int
    end_of_text: int | None  # the checkpoint's eos_token_id


@dataclass(frozen=True)
class EngineStats:
    """A momentary count, and totals since start."""

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int


@dataclass(frozen=True)
class StepStats:
    """One engine step, for metrics: aggregates only."""

    seconds: float
    prefill_tokens: int
    decode_tokens: int
    public_groups: int
    public_tokens: int  # live members of those groups
    private_tokens: int


class EngineStopped(Exception):
    """The engine is stopping or has failed; the request was not finished."""


class AsyncEngine:
    info: EngineInfo
    tokenizer: Tokenizer | None

    def start(self) -> None:
        """Start the engine thread (call inside the running event loop)."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Finish nothing more: abort all, join the thread."""
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """The thread runs and has not failed."""
        raise NotImplementedError

    @property
    def stats(self) -> EngineStats:
        raise NotImplementedError

    def observe(self, listener: Callable[[StepStats], None]) -> None:
        """Call ``listener`` after every step, from the engine thread."""
        raise NotImplementedError

    def submit(self, request: EngineRequest) -> AsyncIterator[Delta]:
        """Check and enqueue at once (raises RequestError: too long, out of vocabulary, queue full), then iterate over
        the deltas of all sequences until each has its finish reason. Leaving the iterator early (aclose,
        cancellation) aborts. Raises EngineStopped from the iterator."""
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """Idempotent; within one step nothing of the request costs anything."""
        raise NotImplementedError
