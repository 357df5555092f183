"""Streams whose reader is slower than the engine: nothing is lost, nothing is held beyond what was asked for."""

from __future__ import annotations

import asyncio

import pytest

from server.engine.async_engine import EngineStopped, RequestStream
from server.engine.request import Delta, EngineRequest, SamplingParams


def stream(n: int = 1) -> tuple[RequestStream, list[str]]:
    closed: list[str] = []
    return RequestStream(EngineRequest("a", ((1,),), SamplingParams(), n=n), closed.append), closed


def test_a_slow_reader_gets_all_that_came_at_once() -> None:
    async def run() -> list[list[str]]:
        deltas, closed = stream(n=2)
        deltas.deliver(Delta(0, "a"))
        deltas.deliver(Delta(1, "b", finish_reason="stop"))
        found = [await anext(deltas)]
        assert not deltas.complete
        asyncio.get_running_loop().call_soon(deltas.deliver, Delta(0, "c"))
        found.append(await anext(deltas))
        deltas.deliver(Delta(0, "d", finish_reason="length"))
        assert deltas.complete and not closed
        found += [batch async for batch in deltas]
        return [[delta.text for delta in batch] for batch in found]

    assert asyncio.run(run()) == [["a", "b"], ["c"], ["d"]]


def test_what_came_before_a_failure_is_delivered() -> None:
    async def run() -> None:
        deltas, closed = stream()
        deltas.deliver(Delta(0, "a"))
        deltas.fail(EngineStopped())
        assert [delta.text for delta in await anext(deltas)] == ["a"]
        with pytest.raises(EngineStopped):
            await anext(deltas)
        assert closed == ["a"]
        with pytest.raises(StopAsyncIteration):
            await anext(deltas)

    asyncio.run(run())


def test_a_reader_that_leaves_aborts() -> None:
    async def run() -> None:
        deltas, closed = stream()
        reading = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert closed == ["a"]

    asyncio.run(run())
