"""A load generator for any server with OpenAI's ``/v1/completions``, streaming. Knows only the wire.

It may share a machine with the server, so it does little for each token: bodies are encoded before the clock starts,
and answers are read after it has stopped. Nothing is retried: a request that failed counts as one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx
from httpx_aiohttp import AiohttpTransport

from clients._load import Lengths, Load, Planned, Traffic
from clients._results import AnswerReader, Failure, Limits, LoadResult, Outcome, summarize
from clients._streaming import ChunkDecoder
from clients.errors import APIError, MotserveError, error_from_response

__all__ = ["Lengths", "Limits", "Load", "LoadResult", "Target", "Traffic", "bench_serve"]

_CONNECT_SECONDS = 10.0
# As many as there are requests under way (aiohttp's 0). Idle ones for less than servers keep them (uvicorn: 5 s): one
# closed just as it is used again would look like an error.
_CONNECTIONS = httpx.Limits(max_connections=0, keepalive_expiry=2.0)

Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class Target:
    """Whom to ask. ``timeout``: seconds that the server may be silent."""

    url: str
    api_key: str | None = None
    timeout: float = 600.0

    def open(self, transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
        """Raises ValueError naming url."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            return httpx.AsyncClient(
                base_url=self.url.rstrip("/").removesuffix("/v1"),
                headers=headers,
                timeout=httpx.Timeout(self.timeout, connect=min(self.timeout, _CONNECT_SECONDS)),
                transport=transport or AiohttpTransport(limits=_CONNECTIONS),
            )
        except httpx.InvalidURL as error:
            raise ValueError(f"url: {self.url!r} is not an address ({error})") from None


async def bench_serve(
    target: Target,
    traffic: Traffic,
    loads: Sequence[Load],
    limits: Limits,
    report: Callable[[LoadResult], None],
    progress: Progress = lambda done, rate: None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> bool:
    """``report`` gets one result a load. False when it was cancelled: then the last one, if any, is of the requests
    that had ended by then. ``progress`` gets the fraction done of all loads, and requests a second of the present one.
    Raises ValueError naming the field when the server cannot be reached or does not say what it serves."""
    async with target.open(transport) as http:
        known = await _look_up(http, target, traffic)
        for number, load in enumerate(loads):
            run = _Run(http, load, partial(_part_of_all, progress, number, len(loads)))
            whole = await run.measure(*known.plan(load))
            if run.ended:
                report(run.result(limits))
            if not whole:
                return False
    return True


def _part_of_all(progress: Progress, number: int, count: int, done: float, rate: float) -> None:
    progress((number + done) / count, rate)


async def _look_up(http: httpx.AsyncClient, target: Target, traffic: Traffic) -> Traffic:
    """``traffic`` with what ``/v1/models`` says where nothing was given: the model's name, and its vocabulary, which
    only motserve tells. The server is asked in any case, so that a wrong address is noticed before anything runs."""
    try:
        response = await http.get("/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"url: nothing answers at {target.url} ({reason}); --url names the server") from None
    models = _models(response)
    model = traffic.model or next((str(name) for name in models), None)
    if model is None:
        said = f"answered {response.status_code}" if not response.is_success else "lists no model"
        raise ValueError(f"model: {target.url}/v1/models {said}; give the model's name")
    vocabulary = traffic.vocabulary or models.get(model)
    if vocabulary is None and not traffic.texts:
        raise ValueError(f"vocab: {target.url} does not say how many tokens it knows; give a number, or texts instead")
    return replace(traffic, model=model, vocabulary=vocabulary)


def _models(response: httpx.Response) -> dict[str, int | None]:
    """Names and vocabulary sizes; nothing where the answer holds none."""
    try:
        listed: list[dict[str, Any]] = response.raise_for_status().json()["data"]
        return {model["id"]: (model.get("mot") or {}).get("vocab_size") for model in listed}
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError, AttributeError):
        return {}


@dataclass(frozen=True)
class _Recorded:
    """An answer as it came: pieces with the times of their coming. ``due`` and ``end`` by the same clock."""

    due: float
    end: float
    pieces: Sequence[tuple[float, bytes]]

    def read(self) -> Outcome:
        decoder, reader = ChunkDecoder(), AnswerReader(self.due)
        try:
            for now, piece in self.pieces:
                reader.take(decoder.feed(piece), now)
            decoder.finish()
            return reader.finish(self.end)
        except MotserveError as error:
            message = error.message if isinstance(error, APIError) else str(error)
            return Failure(self.end - self.due, "stream", message)


class _Run:
    """One load, under way. ``ended`` in the order of the answers' ends."""

    def __init__(self, http: httpx.AsyncClient, load: Load, progress: Progress) -> None:
        self._http, self._load, self._progress = http, load, progress
        self.ended: list[_Recorded | Failure] = []
        self._seconds = self._cpu = 0.0

    async def measure(self, warmup: Sequence[Planned], planned: Sequence[Planned]) -> bool:
        """Whether it came to its end, and was not cancelled."""
        at_once = self._load.concurrency or max(1, len(warmup))
        began, cpu = time.perf_counter(), time.process_time()
        try:
            await self._closed_loop(warmup, at_once, self._ask)
            began, cpu = time.perf_counter(), time.process_time()

            async def ask(request: Planned, due: float) -> object:
                self.ended.append(await self._ask(request, due))
                self._seconds, self._cpu = time.perf_counter() - began, time.process_time() - cpu
                self._progress(len(self.ended) / len(planned), len(self.ended) / self._seconds)
                return None

            if self._load.rate is None:
                await self._closed_loop(planned, at_once, ask)
            else:
                await self._open_loop(planned, began, ask)
        except asyncio.CancelledError:
            return False
        return True

    def result(self, limits: Limits) -> LoadResult:
        outcomes = [ended.read() if isinstance(ended, _Recorded) else ended for ended in self.ended]
        return summarize(self._load, outcomes, limits, self._seconds, self._cpu)

    async def _closed_loop(self, planned: Sequence[Planned], at_once: int, ask: _Ask) -> None:
        waiting = iter(planned)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(planned))):
                group.create_task(_one_after_the_other(waiting, ask))

    async def _open_loop(self, planned: Sequence[Planned], began: float, ask: _Ask) -> None:
        """A request's times count from when it was due: a generator that lags would otherwise hide the wait."""
        async with asyncio.TaskGroup() as group:
            for request in planned:
                due = began + request.due
                await asyncio.sleep(due - time.perf_counter())
                group.create_task(ask(request, due))

    async def _ask(self, request: Planned, due: float) -> _Recorded | Failure:
        """Never raises for what a server or a network does."""
        answering = False
        try:
            async with self._http.stream("POST", "/v1/completions", content=request.body) as response:
                if not response.is_success:
                    raise error_from_response(response.status_code, response.headers, await response.aread())
                answering = True
                pieces = [(time.perf_counter(), piece) async for piece in response.aiter_bytes()]
                return _Recorded(due, time.perf_counter(), pieces)
        except httpx.TimeoutException as error:
            kind, message = "timeout", f"The server was silent for too long ({type(error).__name__})."
        except APIError as error:
            kind, message = str(error.status), error.message
        except (httpx.HTTPError, OSError) as error:
            kind, message = "stream" if answering else "connection", str(error) or type(error).__name__
        return Failure(time.perf_counter() - due, kind, message)


_Ask = Callable[[Planned, float], Coroutine[Any, Any, object]]


async def _one_after_the_other(waiting: Iterator[Planned], ask: _Ask) -> None:
    for request in waiting:
        await ask(request, time.perf_counter())
