"""The engine in a process of its own: model and event loop then share no interpreter lock, and run side by side.

The two talk over a socket pair in pickled messages: settings first, then requests and aborts one way, reports the
other. When either process ends, the other one notices by the end of its stream. The server's side needs no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from model.errors import CheckpointError
from model.tokenizer import Tokenizer
from server.config import Settings
from server.engine.admission import Admission
from server.engine.async_engine import AsyncEngine, EngineInfo
from server.engine.loop import EngineLoop, Inbox, Item, Report

_log = logging.getLogger("motserve")

# The new interpreter looks for modules where this one does.
_START = "import sys; sys.path[:] = {path!r}; from server.engine_process import run; run({descriptor})"
_STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Ready:
    """What the engine's process says when it has loaded its checkpoint."""

    info: EngineInfo
    admission: Admission
    name: str
    folder: Path


class EngineProcess:
    """Starts loading at once. ``wait`` for it, then it hosts the engine."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        ours, theirs = socket.socketpair()
        command = _START.format(path=sys.path, descriptor=theirs.fileno())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", command], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._connection = Connection(ours.detach())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection.send(settings)

    def wait(self) -> tuple[AsyncEngine, Ready]:
        """The engine, once it is there. Raises CheckpointError and ValueError as loading does."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise ValueError("engine: its process ended while it was loading") from None
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Ready)
        tokenizer = Tokenizer.load(answer.folder)
        engine = AsyncEngine(self, answer.info, answer.admission, tokenizer, max_waiting=self._settings.max_waiting)
        return engine, answer

    def start(self, report: Callable[[Report], None]) -> None:
        """A thread reads what comes: event loops that watch a descriptor make it non-blocking, and a message that has
        come in part would then look like an end."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(self._loop, report), name="motserve-reports", daemon=True).start()

    def put(self, item: Item) -> None:
        try:
            self._connection.send(item)
        except OSError:  # it has ended: ``_read`` says so to everyone
            return

    def stop(self) -> None:
        self._loop = None
        try:
            self._connection.send(None)
            self._process.wait(_STOP_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Hang up, as this process's end does; the engine's process then ends by itself."""
        self._connection.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def alive(self) -> bool:
        return self._loop is not None and self.running

    def _read(self, loop: asyncio.AbstractEventLoop, report: Callable[[Report], None]) -> None:
        """To the end of the engine's process."""
        over = False
        while not over:
            try:
                news = self._connection.recv()
            except (EOFError, OSError):
                if self._loop is not None:
                    _log.error("the engine's process has ended")
                news, over = Report([], None, 0, 0, failed=True, over=True), True
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(report, news)


def run(descriptor: int) -> None:
    """The engine's process, from its first message to the last. The server decides when it ends."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    from server.loading import load  # torch: not for the server's process

    connection = Connection(descriptor)
    settings: Settings = connection.recv()
    configure_logging(settings)
    try:
        loaded = load(settings)
    except (CheckpointError, ValueError, OSError) as error:
        connection.send(type(error)(str(error)) if isinstance(error, CheckpointError) else ValueError(str(error)))
        return
    inbox: Inbox = queue.SimpleQueue()
    engine = loaded.engine.direct
    connection.send(Ready(loaded.engine.info, loaded.admission, loaded.name, loaded.folder))
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    freeze()
    try:
        EngineLoop(engine, inbox, connection.send).run()
    except BrokenPipeError:
        return  # the server is gone


def _receive(connection: Connection, inbox: Inbox) -> None:
    """Always reading, so that the server never waits for a step to end before it can send."""
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            item = None
        inbox.put(item)
        if item is None:
            return


def freeze() -> None:
    """What has been loaded stays: collecting garbage need not look at it time and again."""
    gc.collect()
    gc.freeze()


def configure_logging(settings: Settings) -> None:
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
