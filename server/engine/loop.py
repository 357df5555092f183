"""The engine's loop, and a thread to run it in. Knows neither coroutines' streams nor what crosses processes.

What has come in is applied before each step, so that an aborted request costs nothing from the next step on.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from server.engine.request import Delta, EngineRequest, StepStats

if TYPE_CHECKING:  # a server whose engine is in another process does without torch
    from server.engine.engine import Engine

_log = logging.getLogger("motserve.engine")
_FAILURES = 3  # steps that may fail in a row before the engine gives up


@dataclass(frozen=True)
class Report:
    """What came of a step, or of an abort where there was nothing to compute (``step`` None). ``failed``: every request
    under way is lost; ``over``: and the engine has given up."""

    news: list[tuple[str, Delta]]
    step: StepStats | None
    running: int
    blocks_used: int
    failed: bool = False
    over: bool = False


Item = EngineRequest | str  # a request to add, or the id of one to abort
Inbox = queue.SimpleQueue[Item | None]  # None: stop


class EngineHost(Protocol):
    """Where an engine runs. ``start`` and ``put`` are for the event loop's thread, on which ``report`` is called."""

    def start(self, report: Callable[[Report], None]) -> None: ...

    def put(self, item: Item) -> None: ...

    def stop(self) -> None:
        """Finish nothing more. Blocks until the engine has ended. Idempotent."""

    @property
    def alive(self) -> bool: ...


class EngineLoop:
    """Steps ``engine`` while there is something to do, until the inbox says stop."""

    def __init__(self, engine: Engine, inbox: Inbox, report: Callable[[Report], None]) -> None:
        self._engine, self._inbox, self._report = engine, inbox, report

    def run(self) -> None:
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
                self._tell([], None, failed=True, over=failures >= _FAILURES)
                if failures >= _FAILURES:
                    return
                continue
            self._tell(news, self._engine.last_step)

    def _tell(
        self, news: list[tuple[str, Delta]], step: StepStats | None, *, failed: bool = False, over: bool = False
    ) -> None:
        scheduler = self._engine.scheduler
        self._report(Report(news, step, scheduler.running, scheduler.blocks_in_use, failed, over))

    def _take_inbox(self) -> bool:
        """Apply what has come in, waiting for something when there is nothing to do. False: stop."""
        aborted = False
        while True:
            if aborted and self._engine.idle:  # no step will tell
                aborted = False
                self._tell([], None)
            try:
                item = self._inbox.get(block=self._engine.idle)
            except queue.Empty:
                return True
            if item is None:
                self._engine.abort_all()
                return False
            if isinstance(item, str):
                self._engine.abort(item)
                aborted = True
            else:
                self._engine.add(item)


class EngineThread:
    """Hosts an engine in a thread beside the event loop, with which it shares the interpreter's lock."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: Inbox = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def engine(self) -> Engine:
        """The engine itself, for a caller without an event loop; not beside ``start``."""
        assert self._thread is None, "the engine's thread owns the engine"
        return self._engine

    def start(self, report: Callable[[Report], None]) -> None:
        loop = asyncio.get_running_loop()

        def tell(news: Report) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(report, news)

        run = EngineLoop(self._engine, self._inbox, tell).run
        self._thread = threading.Thread(target=run, name="motserve-engine", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        self._inbox.put(item)

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._inbox.put(None)
            thread.join()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()
