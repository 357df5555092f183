"""The engine behind the event loop: requests in from coroutines, deltas out to them, one thread stepping.

This is the engine's only face towards the server.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from server.engine.engine import Engine
from server.engine.request import Delta, EngineRequest, Privacy, RequestError, StepStats

__all__ = ["AsyncEngine", "EngineInfo", "EngineStats", "EngineStopped", "RequestStream", "StepStats"]

_log = logging.getLogger("motserve.engine")
_FAILURES = 3  # steps that may fail in a row before the engine gives up


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
    """Runs ``engine`` in a thread of its own. All methods are for the event loop's thread."""

    def __init__(self, engine: Engine, info: EngineInfo, *, max_waiting: int) -> None:
        self.info, self.tokenizer = info, engine.tokenizer
        self._engine = engine
        self._most = engine.scheduler.limits.max_running + max_waiting
        self._inbox: queue.SimpleQueue[EngineRequest | str | None] = queue.SimpleQueue()  # None: stop; str: abort
        self._streams: dict[str, tuple[RequestStream, int]] = {}
        self._listeners: list[Callable[[StepStats], None]] = []
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed = False

    @property
    def direct(self) -> Engine:
        """The engine itself, for a caller without an event loop; not beside ``start``."""
        assert self._thread is None, "the engine's thread owns the engine"
        return self._engine

    def start(self) -> None:
        """Start the engine thread; call inside the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="motserve-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Finish nothing more: end every stream, join the thread."""
        thread, self._thread = self._thread, None
        self._end_streams()
        if thread is not None:
            self._inbox.put(None)
            await asyncio.to_thread(thread.join)

    @property
    def ready(self) -> bool:
        """The thread runs and has not given up."""
        return self._thread is not None and self._thread.is_alive() and not self._failed

    @property
    def stats(self) -> EngineStats:
        scheduler = self._engine.scheduler
        total = sum(count for _, count in self._streams.values())
        running = min(scheduler.running, total)
        return EngineStats(running, total - running, scheduler.blocks.total, scheduler.blocks_in_use)

    def observe(self, listener: Callable[[StepStats], None]) -> None:
        """Call ``listener`` after every step, from the engine thread."""
        self._listeners.append(listener)

    def submit(self, request: EngineRequest) -> RequestStream:
        """Check and enqueue. Raises RequestError (too long, out of vocabulary, queue full) or EngineStopped."""
        if not self.ready:
            raise EngineStopped("the engine is not running")
        self._engine.check(request)
        count = len(request.prompts) * request.n
        if sum(waiting for _, waiting in self._streams.values()) + count > self._most:
            raise RequestError("the server's queue is full; try again later", param=None, code="queue_full", status=429)
        stream = RequestStream(request, self.abort)
        self._streams[request.request_id] = (stream, count)
        self._inbox.put(request)
        return stream

    def abort(self, request_id: str) -> None:
        """Idempotent; before the next step begins nothing of the request is left in the engine."""
        if self._streams.pop(request_id, None) is not None:
            self._inbox.put(request_id)

    # The engine's thread

    def _run(self) -> None:
        failures = 0
        while self._take_inbox():
            try:
                news = self._engine.step()
                failures = 0
            except Exception as error:  # one bad step must not end the server
                failures += 1
                # The message might quote what a request holds: the kind of error and the place are enough.
                place = "".join(traceback.format_tb(error.__traceback__))
                _log.error("engine step failed: %s\n%s", type(error).__name__, place)
                self._engine.abort_all()
                self._failed = failures >= _FAILURES
                self._call(self._end_streams)
                if self._failed:
                    return
                continue
            for listener in self._listeners:
                listener(self._engine.last_step)
            self._call(self._deliver, news)

    def _take_inbox(self) -> bool:
        """Apply what has come in, waiting for something when there is nothing to do. False: stop."""
        while True:
            try:
                item = self._inbox.get(block=self._engine.idle)
            except queue.Empty:
                return True
            if item is None:
                self._engine.abort_all()
                return False
            if isinstance(item, str):
                self._engine.abort(item)
            else:
                self._engine.add(item)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    # Back on the event loop

    def _deliver(self, news: list[tuple[str, Delta]]) -> None:
        for request_id, delta in news:
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
