"""The load generator against scripted servers: loops, failures, cancelling, and what it asks a server first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import pytest

from clients.benchmark import Lengths, Limits, Load, LoadResult, Target, Traffic, bench_serve

Handler = Callable[[httpx.Request], Coroutine[Any, Any, httpx.Response]]

TRAFFIC = Traffic(Lengths(3, 3), Lengths(2, 2), "demo", 50)
MODELS = {"data": [{"id": "demo", "mot": {"vocab_size": 50}}]}


def chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}]}


def usage(count: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}, "mot": {"private": True}}


class Pieces(httpx.AsyncByteStream):
    def __init__(self, *pieces: bytes, error: Exception | None = None) -> None:
        self._pieces, self._error = pieces, error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            await asyncio.sleep(0.001)
            yield piece
        if self._error is not None:
            raise self._error


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


GOOD = (event(chunk("a")), event(chunk("b")), event(usage(2)) + b"data: [DONE]\n\n")


async def answers(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, stream=Pieces(*GOOD))


def bench(
    handler: Handler, *loads: Load, traffic: Traffic = TRAFFIC, models: httpx.Response | Exception | None = None
) -> list[LoadResult]:
    async def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            if isinstance(models, Exception):
                raise models
            return models or httpx.Response(200, json=MODELS)
        assert request.url.path == "/v1/completions" and request.headers["authorization"] == "Bearer k"
        return await handler(request)

    results: list[LoadResult] = []
    run = bench_serve(
        Target("http://there/v1/", "k"), traffic, loads, Limits(), results.append,
        transport=httpx.MockTransport(respond),
    )  # fmt: skip
    assert asyncio.run(run)
    return results


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_a_closed_loop_keeps_so_many_under_way(concurrency: int) -> None:
    under_way, seen, total = 0, [], 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, total
        under_way += 1
        total += 1
        seen.append(under_way)
        await asyncio.sleep(0.002)
        under_way -= 1
        return httpx.Response(200, content=b"".join(GOOD))

    (result,) = bench(handler, Load(24, concurrency, warmup=5))
    assert max(seen) == concurrency and total == 29
    assert (result.requests, result.errors, result.concurrency) == (24, 0, concurrency)
    assert (result.output_tokens, result.prompt_tokens, result.private_share) == (2, 7, 1.0)


def test_an_open_loop_waits_for_nobody() -> None:
    came: list[float] = []
    everybody = asyncio.Event()

    async def handler(request: httpx.Request) -> httpx.Response:
        came.append(asyncio.get_running_loop().time())
        if len(came) == 12:
            everybody.set()
        await asyncio.wait_for(everybody.wait(), 10)
        return httpx.Response(200, content=b"".join(GOOD))

    load = Load(12, None, rate=60.0)
    (result,) = bench(handler, load)
    assert (result.errors, result.rate) == (0, 60.0)
    planned = TRAFFIC.plan(load)[1]
    assert came[-1] - came[0] >= planned[-1].due - planned[0].due - 0.005
    assert result.ttft_p99 is not None and result.ttft_p99 > (planned[-1].due - planned[0].due) * 0.8
    assert result.concurrency > 2


@pytest.mark.parametrize(
    ("bad", "kind", "said"),
    [
        (httpx.Response(429, json={"error": {"message": "too much"}}), "429", "too much"),
        (httpx.Response(500, content=b"<html>"), "500", "<html>"),
        (httpx.ConnectError("refused"), "connection", "refused"),
        (httpx.ReadTimeout("slow"), "timeout", "silent"),
        (Pieces(GOOD[0]), "stream", "[DONE]"),
        (Pieces(GOOD[0], error=httpx.ReadError("cut")), "stream", "cut"),
        (Pieces(GOOD[0], error=httpx.ReadTimeout("")), "timeout", "ReadTimeout"),
        (Pieces(GOOD[0], event({"error": {"message": "the engine stopped"}})), "stream", "the engine stopped"),
        (Pieces(b"data: {\n\n"), "stream", "JSON"),
        (Pieces(event({"choices": 3})), "stream", "chunk"),
    ],
)
def test_what_fails_is_counted_and_the_rest_goes_on(bad: Any, kind: str, said: str) -> None:
    number = 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal number
        number += 1
        if number % 3:
            return await answers(request)
        if isinstance(bad, Exception):
            raise bad
        return httpx.Response(200, stream=bad) if isinstance(bad, Pieces) else httpx.Response(
            bad.status_code, content=bad.content
        )  # fmt: skip

    first, second = bench(handler, Load(9, 2), Load(9, None, rate=500.0))
    assert (first.requests, first.errors, first.errors_by_kind) == (9, 3, {kind: 3})
    assert first.first_error is not None and said in first.first_error
    assert (second.errors, second.goodput) == (3, 6 / 9)
    assert first.output_tokens_per_second == pytest.approx(6 * 2 / first.seconds)


def test_what_has_ended_is_reported_when_it_is_cancelled() -> None:
    results: list[LoadResult] = []
    reached, count = asyncio.Event(), 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal count
        count += 1  # the first one asks for the models
        if count > 6:
            await asyncio.sleep(60)
        return httpx.Response(200, json=MODELS) if request.method == "GET" else await answers(request)

    async def run() -> bool:
        work = asyncio.ensure_future(
            bench_serve(
                Target("http://there"), TRAFFIC, [Load(50, 2), Load(50, 4)], Limits(), results.append,
                progress=lambda done, rate: reached.set() if done >= 5 / 100 else None,
                transport=httpx.MockTransport(handler),
            )
        )  # fmt: skip
        await asyncio.wait_for(reached.wait(), 10)
        work.cancel()
        return await work

    assert asyncio.run(run()) is False
    assert [(result.concurrency, result.requests, result.errors) for result in results] == [(2, 5, 0)]


def test_the_model_and_its_vocabulary_are_asked_for() -> None:
    sent: list[dict[str, Any]] = []

    async def handler(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return await answers(request)

    traffic = Traffic(Lengths(30, 30), Lengths(2, 2))
    bench(handler, Load(20, 2), traffic=traffic)
    assert {body["model"] for body in sent} == {"demo"}
    largest = max(token for body in sent for token in body["prompt"])
    assert 40 <= largest < 50


@pytest.mark.parametrize(
    ("models", "traffic", "said"),
    [
        (httpx.ConnectError("refused"), TRAFFIC, "--url"),
        (httpx.Response(404), Traffic(Lengths(1, 1), Lengths(1, 1), vocabulary=9), "^model: .*404"),
        (httpx.Response(200, json={"data": []}), Traffic(Lengths(1, 1), Lengths(1, 1), vocabulary=9), "^model: "),
        (httpx.Response(200, json={"data": [{"id": "m"}]}), Traffic(Lengths(1, 1), Lengths(1, 1)), "^vocab: "),
        (httpx.Response(200, json=MODELS), Traffic(Lengths(1, 1), Lengths(1, 1), "another"), "^vocab: "),
    ],
)
def test_what_is_missing_is_named(models: Any, traffic: Traffic, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bench(answers, Load(2, 1), traffic=traffic, models=models)


def test_a_server_without_a_list_of_models_will_do() -> None:
    (result,) = bench(answers, Load(2, 1), models=httpx.Response(404))
    assert result.errors == 0


def test_an_address_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match=r"^url: "):
        Target("http://[::1").open()
