"""The engine behind the event loop: requests in from coroutines, deltas out to them, wherever it runs.

This is the engine's only face towards the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.tokenizer import Tokenizer
from server.engine.admission import Admission
from server.engine.loop import EngineHost, EngineThread, Report
from server.engine.request import Delta, EngineRequest, Privacy, RequestError, StepStats

if TYPE_CHECKING:
    from server.engine.engine import Engine

__all__ = ["AsyncEngine", "EngineInfo", "EngineStats", "EngineStopped", "RequestStream", "StepStats"]


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
    quantized: str | None  # type of the expert weights where it is another one
    parameters: int
    end_of_text: int | None  # the checkpoint's eos_token_id


@dataclass(frozen=True)
class EngineStats:
    """A momentary count."""

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int


class EngineStopped(Exception):
    """The engine is stopping or has failed; the request was not finished."""


class RequestStream(AsyncIterator[list[Delta]]):
    """The deltas of one request, each time all that have come since, until each of its sequences has its finish reason.
    Leaving early aborts it. However slowly it is read, it holds no more than the request may generate."""

    def __init__(self, request: EngineRequest, close: Callable[[str], None]) -> None:
        self._request_id = request.request_id
        self._close = close
        self._to_come = self._unread = len(request.prompts) * request.n  # sequences without a finish reason
        self._news: list[Delta] = []
        self._failure: EngineStopped | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def complete(self) -> bool:
        """The engine owes nothing more, whether or not it has been read."""
        return self._to_come == 0

    def deliver(self, delta: Delta) -> None:
        self._news.append(delta)
        if delta.finish_reason is not None:
            self._to_come -= 1
        self._wake()

    def fail(self, failure: EngineStopped) -> None:
        """Nothing more will come."""
        self._failure = failure
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> list[Delta]:
        if self._unread == 0:
            raise StopAsyncIteration
        if not self._news and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                await self.aclose()
                raise
        if not self._news:
            assert self._failure is not None, "woken for nothing"
            await self.aclose()
            raise self._failure
        news, self._news = self._news, []
        self._unread -= sum(delta.finish_reason is not None for delta in news)
        return news

    async def aclose(self) -> None:
        """Idempotent."""
        self._unread = 0
        self._news = []
        self._close(self._request_id)


class AsyncEngine:
    """Requests to the engine at ``host``, its deltas to their streams. All methods are for the event loop's thread."""

    def __init__(
        self, host: EngineHost, info: EngineInfo, admission: Admission, tokenizer: Tokenizer | None, *, max_waiting: int
    ) -> None:
        self.info, self.tokenizer = info, tokenizer
        self._host, self._admission = host, admission
        self._most = admission.capacity.max_running + max_waiting
        self._streams: dict[str, tuple[RequestStream, int]] = {}
        self._listeners: list[Callable[[StepStats], None]] = []
        self._running = self._blocks_used = 0
        self._failed = False

    @property
    def direct(self) -> Engine:
        """The engine itself, for a caller without an event loop; not beside ``start``."""
        assert isinstance(self._host, EngineThread), "the engine is in another process"
        return self._host.engine

    def start(self) -> None:
        """Let the engine run; call inside the running event loop."""
        self._host.start(self._take)

    async def stop(self) -> None:
        """Finish nothing more: end every stream, wait for the engine's end."""
        self._end_streams()
        await asyncio.to_thread(self._host.stop)

    @property
    def ready(self) -> bool:
        """The engine runs and has not given up."""
        return self._host.alive and not self._failed

    @property
    def stats(self) -> EngineStats:
        total = sum(count for _, count in self._streams.values())
        running = min(self._running, total)
        return EngineStats(running, total - running, self._admission.capacity.blocks, self._blocks_used)

    def observe(self, listener: Callable[[StepStats], None]) -> None:
        """Call ``listener`` after every step."""
        self._listeners.append(listener)

    def submit(self, request: EngineRequest) -> RequestStream:
        """Check and enqueue. Raises RequestError (too long, out of vocabulary, queue full) or EngineStopped."""
        if not self.ready:
            raise EngineStopped("the engine is not running")
        self._admission.check(request)
        count = len(request.prompts) * request.n
        if sum(waiting for _, waiting in self._streams.values()) + count > self._most:
            raise RequestError("the server's queue is full; try again later", param=None, code="queue_full", status=429)
        stream = RequestStream(request, self.abort)
        self._streams[request.request_id] = (stream, count)
        self._host.put(request)
        return stream

    def abort(self, request_id: str) -> None:
        """Idempotent; before the next step begins nothing of the request is left in the engine."""
        if self._streams.pop(request_id, None) is not None:
            self._host.put(request_id)

    def _take(self, report: Report) -> None:
        self._running, self._blocks_used = report.running, report.blocks_used
        if report.failed:
            self._failed = report.over
            self._end_streams()
        if report.step is not None:
            for listener in self._listeners:
                listener(report.step)
        for request_id, delta in report.news:
            entry = self._streams.get(request_id)
            if entry is None:
                continue
            stream, _ = entry
            stream.deliver(delta)
            if stream.complete:
                del self._streams[request_id]

    def _end_streams(self) -> None:
        streams, self._streams = self._streams, {}
        for stream, _ in streams.values():
            stream.fail(EngineStopped("the engine could not finish the request"))
