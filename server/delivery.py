"""From the engine's deltas to the client's socket: plain or as a stream, until done, cut off or left alone.

Whatever ends a request early (the client goes, time runs out, an error) ends in ``abort`` before anything else is
awaited, so that it costs nothing from the next step on. Knows nothing of what a chunk holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from server.auth import Place
from server.engine.async_engine import AsyncEngine, EngineStopped
from server.engine.request import Delta, RequestError
from server.errors import error_body, internal_error, log_failure, stopped_error, timeout_error
from server.logprobs import Json
from server.metrics import Metrics, RequestTimer
from server.responses import Answer
from server.sse import DONE, EventEncoder, EventTemplate, event

_STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
# A client whose socket is full when its time is up may not read the news either.
_LAST_WORDS_SECONDS = 5.0


@dataclass(frozen=True)
class Delivery:
    """A request under way: its deltas, the answer they make, and what to do when it ends early."""

    engine: AsyncEngine
    metrics: Metrics
    request_id: str
    deltas: AsyncIterator[list[Delta]]
    answer: Answer
    timer: RequestTimer
    place: Place
    timeout: float

    async def news(self) -> AsyncIterator[list[Delta]]:
        """The deltas, all that have come at once, to the last one."""
        async for deltas in self.deltas:
            if any(delta.finish_reason == "abort" for delta in deltas):
                raise EngineStopped
            self.timer.on_deltas(deltas)
            yield deltas
            if self.answer.finished:
                return
        raise EngineStopped  # the engine owes every sequence a finish reason

    def end(self) -> None:
        """Nothing more is wanted. Idempotent."""
        self.place.leave()
        if not self.answer.finished:
            self.engine.abort(self.request_id)


async def plain_response(delivery: Delivery, receive: Receive) -> Response:
    """The whole answer at once. Raises RequestError on time-out and EngineStopped."""
    work = asyncio.ensure_future(_collect(delivery))
    try:
        outcome = await _first_of(work, receive, delivery.timeout)
        if outcome == "done":
            return JSONResponse(work.result())
        delivery.metrics.cut_off(outcome)
        if outcome == "timeout":
            raise timeout_error(delivery.timeout)
        return Response(status_code=499)  # to nobody
    except (EngineStopped, asyncio.CancelledError):
        delivery.metrics.cut_off("error")
        raise
    finally:
        delivery.end()
        await _cancel(work)


async def _collect(delivery: Delivery) -> Json:
    choices = [choice async for deltas in delivery.news() for d in deltas for choice in delivery.answer.add(d)]
    return delivery.answer.whole(choices)


class EventStream(Response):
    """The answer as server-sent events, written as they come."""

    def __init__(self, delivery: Delivery, *, include_usage: bool) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(_STREAM_HEADERS)
        self._delivery = delivery
        self._encoder = EventEncoder(delivery.answer.head(stream=True))
        self._include_usage = include_usage
        self._templates: dict[int, EventTemplate] = {}  # of each choice's middle: what most tokens need

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        delivery = self._delivery
        work = asyncio.ensure_future(self._write(send))
        error: RequestError | None = None
        try:
            outcome = await _first_of(work, receive, delivery.timeout)
            if outcome == "done":
                error = work.result()
            else:
                delivery.metrics.cut_off(outcome)
            if outcome == "timeout":
                error = timeout_error(delivery.timeout)
        finally:
            delivery.end()
            await _cancel(work)
        if error is not None:
            await _last_words(send, error)

    async def _write(self, send: Send) -> RequestError | None:
        """Everything to the end, or the error that came between: headers are out by then, so it must be told as an
        event."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        answer = self._delivery.answer
        try:
            async for deltas in self._delivery.news():  # several at once when the socket was full
                body = b"".join(map(self._events, deltas))
                finished = answer.finished
                if finished:
                    body += self._ending()
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": not finished})
        except EngineStopped:
            self._delivery.metrics.cut_off("error")
            return stopped_error()
        except OSError:  # the socket broke under a write: the client has gone
            self._delivery.metrics.cut_off("disconnect")
        except Exception as error:  # the boundary: nothing above can still answer with a status
            log_failure(error)
            self._delivery.metrics.cut_off("error")
            return internal_error()
        return None

    def _events(self, delta: Delta) -> bytes:
        """What one delta has to show."""
        answer = self._delivery.answer
        if not answer.continues(delta):
            choices = answer.add(delta)
            return b"".join(self._event(c, last=answer.finished and c is choices[-1]) for c in choices)
        answer.count(delta)
        template = self._templates.get(delta.sequence_index)
        if template is None:
            template = self._templates[delta.sequence_index] = self._template(delta.sequence_index)
        return template.event(delta.text, delta.token_ids)

    def _template(self, index: int) -> EventTemplate:
        choice = self._delivery.answer.continuation(index, EventTemplate.TEXT, EventTemplate.NUMBERS)
        return EventTemplate(self._event(choice, last=False))

    def _event(self, choice: Json, *, last: bool) -> bytes:
        rest: dict[str, Any] = {"choices": [choice]}
        if self._include_usage:
            rest["usage"] = None
        if last:
            rest["mot"] = self._delivery.answer.receipt()
        return self._encoder.event(rest)

    def _ending(self) -> bytes:
        if not self._include_usage:
            return DONE
        answer = self._delivery.answer
        return self._encoder.event({"choices": [], "usage": answer.usage(), "mot": answer.receipt()}) + DONE


async def _first_of(work: asyncio.Future[Any], receive: Receive, timeout: float) -> str:
    """What comes first: the work is ``done``, the client has gone (``disconnect``), or time is up (``timeout``)."""
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        done, _ = await asyncio.wait({work, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _cancel(gone)
    if work in done:
        return "done"
    return "disconnect" if gone in done else "timeout"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel and see it end, so that nothing of it runs later; its outcome has been looked at or no longer matters."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _last_words(send: Send, error: RequestError) -> None:
    """The error as the stream's last event."""
    body = event(error_body(error))
    try:
        async with asyncio.timeout(_LAST_WORDS_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": False})
    except (OSError, TimeoutError):
        return  # nobody listens
