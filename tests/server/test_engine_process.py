"""The engine in a process of its own, against the same engine in a thread."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvloop

from server.app import create_app
from server.config import Settings
from server.engine.async_engine import AsyncEngine, EngineStopped
from server.engine.request import Delta, EngineRequest, Privacy, SamplingParams
from server.engine_process import EngineProcess
from server.loading import load
from tests.server.conftest import wait_until

PROMPTS = tuple((7 * n + 1, 300 + n, 12) for n in range(5))


def settings() -> Settings:
    return Settings(log_level="error", kv_cache_memory=2**26, dtype="float32")


def requests() -> list[EngineRequest]:
    """Private, so that answers do not depend on when each arrives."""
    sampling = SamplingParams(max_tokens=9, seed=3, logprobs=2, stop=("e",))
    return [
        EngineRequest(f"r{n}", (prompt,), sampling, n=2, privacy=Privacy(0.0, 0.0)) for n, prompt in enumerate(PROMPTS)
    ]


async def answers(engine: AsyncEngine) -> list[list[Delta]]:
    async def one(request: EngineRequest) -> list[Delta]:
        found = [delta async for deltas in engine.submit(request) for delta in deltas]
        return sorted(found, key=lambda delta: delta.sequence_index)

    engine.start()
    try:
        return await asyncio.gather(*map(one, requests()))
    finally:
        await engine.stop()


@pytest.fixture
def process() -> Iterator[EngineProcess]:
    started = EngineProcess(settings())
    yield started
    started.stop()


def test_both_hosts_give_the_same(process: EngineProcess) -> None:
    other, ready = process.wait()
    loaded = load(settings())
    assert (ready.info, ready.admission, ready.name) == (loaded.engine.info, loaded.admission, loaded.name)
    assert asyncio.run(answers(other)) == asyncio.run(answers(loaded.engine))


def test_more_at_once_than_any_buffer_holds(process: EngineProcess) -> None:
    """On the event loop that serves, in both directions: what goes or comes in part is not the end."""
    engine, _ = process.wait()
    sampling = SamplingParams(max_tokens=2, prompt_logprobs=20, ignore_eos=True)
    prompts = [tuple((row * 31 + place * 7) % 4000 for place in range(200)) for row in range(240)]

    async def one(row: int) -> int:
        request = EngineRequest(f"r{row}", (prompts[row],), sampling)
        found = [delta async for deltas in engine.submit(request) for delta in deltas]
        return sum(len(delta.prompt_logprobs or ()) for delta in found)

    async def run() -> list[int]:
        engine.start()
        try:
            async with asyncio.timeout(120):
                return await asyncio.gather(*map(one, range(len(prompts))))
        finally:
            await engine.stop()

    assert uvloop.run(run()) == [200] * len(prompts)


def test_aborts_reach_it_and_its_death_is_noticed(process: EngineProcess) -> None:
    engine, _ = process.wait()

    async def run() -> None:
        assert not engine.ready
        engine.start()
        stream = engine.submit(EngineRequest("long", ((1, 2),), SamplingParams(max_tokens=250, ignore_eos=True)))
        await anext(stream)
        assert engine.ready and engine.stats.kv_blocks_used > 0
        await stream.aclose()
        async with asyncio.timeout(30):
            while engine.stats.kv_blocks_used:
                await asyncio.sleep(0.01)
        stream = engine.submit(EngineRequest("lost", ((1, 2),), SamplingParams(max_tokens=250, ignore_eos=True)))
        await anext(stream)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineStopped):
            async for _ in stream:
                pass
        assert not engine.ready
        with pytest.raises(EngineStopped):
            engine.submit(EngineRequest("late", ((1, 2),), SamplingParams()))
        await engine.stop()

    asyncio.run(run())


def test_it_ends_with_its_server(process: EngineProcess) -> None:
    """However the server ends: the socket between them closes."""
    process.wait()
    process.close()
    wait_until(lambda: not process.running)


def test_what_it_cannot_load_is_told(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(Exception, match=r"config\.json") as here:
            load(Settings(model=folder))
        process = EngineProcess(Settings(model=folder))
        with pytest.raises(type(here.value), match=r"config\.json"):
            process.wait()
        process.stop()


def test_over_http(process: EngineProcess) -> None:
    engine, ready = process.wait()
    app = create_app(engine, settings(), ready.name)

    async def run() -> None:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                body = {"prompt": "Once", "max_tokens": 5, "stream": True}
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
                assert "motserve_decode_tokens_total 4.0" in (await client.get("/metrics")).text

    asyncio.run(run())
