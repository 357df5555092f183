"""Real servers on real ports: around the scripted engine, and around a real one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

from model.tokenizer import Tokenizer
from server.app import create_app
from server.chat import ChatTemplate
from server.config import Settings
from server.loading import load
from tests.server.fake_engine import STORY, FakeEngine, small_tokenizer


@dataclass
class Live:
    """A running server. ``client`` talks to it, ``engine`` is what it talks to."""

    url: str
    client: httpx.Client
    engine: FakeEngine

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Returns as soon as ``condition`` holds; fails when it does not come to."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """The address of a server with a real engine, which ends with the block."""
    loaded = load(settings)
    app = create_app(loaded.engine, settings, loaded.name)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Iterator[Callable[..., Live]]:
    """Starts servers: ``serve(tokenizer=..., template=..., **settings)``."""
    stops: list[Callable[[], None]] = []

    def start(
        *, tokenizer: Tokenizer | None = tokenizer, template: ChatTemplate | None = None, **settings: Any
    ) -> Live:
        engine = FakeEngine(tokenizer, tokenizer.encode(STORY) if tokenizer else list(range(7, 40)))
        app = create_app(engine, Settings(**settings), "tiny", chat_template=template)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = httpx.Client(base_url=url, timeout=20)

        def stop() -> None:
            client.close()
            server.should_exit = True
            thread.join(10)
            listener.close()
            assert not thread.is_alive()

        stops.append(stop)
        return Live(url, client, engine)

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def live(serve: Callable[..., Live]) -> Live:
    """A server with the usual settings."""
    return serve()
