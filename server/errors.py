"""OpenAI's error object, and the last resort that turns any failure into one.

Messages name fields and limits, never what a client wrote: an error that quotes a prompt would carry it into logs
and into other people's screens. Knows nothing of engines or schemas.
"""

from __future__ import annotations

import logging
import traceback

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine.async_engine import EngineStopped
from server.engine.request import RequestError

_log = logging.getLogger("motserve.http")

ErrorBody = dict[str, dict[str, str | None]]

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 429: "rate_limit_exceeded"}


def _type_of(status: int) -> str:
    """OpenAI's error type for a status."""
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error"
    )


def error_body(error: RequestError) -> ErrorBody:
    """``{"error": {...}}`` as OpenAI writes it."""
    return {
        "error": {
            "message": str(error),
            "type": _type_of(error.status),
            "param": error.param,
            "code": error.code or _CODES.get(error.status),
        }
    }


def error_response(error: RequestError) -> JSONResponse:
    """The whole answer. OpenAI's clients retry 429 and every 5xx: 429 says when, and a request that took too long
    once is not worth the same time again."""
    headers = {}
    if error.status == 429:
        headers["retry-after"] = "1"
    if error.status == 504:
        headers["x-should-retry"] = "false"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def stopped_error() -> RequestError:
    """What a client is told when the engine ends under its request."""
    return RequestError("The engine is not running; try again later.", param=None, code="engine_stopped", status=503)


def timeout_error(seconds: float) -> RequestError:
    """What a client is told when its request took longer than the server allows."""
    return RequestError(
        f"The request took longer than this server's limit of {seconds:g} seconds.",
        param=None,
        code="request_timeout",
        status=504,
    )


def internal_error() -> RequestError:
    """What a client is told of a mistake of ours: nothing but that."""
    return RequestError("Internal server error.", param=None, code="internal_error", status=500)


def log_failure(error: BaseException) -> None:
    """Where it happened and what kind it is, without its message: messages quote values, and values are prompts."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("unexpected %s\n%s", type(error).__qualname__, frames)


def install_error_handlers(app: FastAPI) -> None:
    """Every error a handler can raise, as OpenAI's object."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        return error_response(error if isinstance(error, RequestError) else internal_error())

    async def stopped(_: Request, __: Exception) -> JSONResponse:
        return error_response(stopped_error())

    async def http(_: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 500
        message = {404: "There is nothing at this path.", 405: "This path does not take this method."}.get(
            status, "The request cannot be served."
        )
        response = error_response(RequestError(message, param=None, status=status))
        if isinstance(error, HTTPException) and error.headers:
            response.headers.update(error.headers)
        return response

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(EngineStopped, stopped)
    app.add_exception_handler(HTTPException, http)


class CatchAll:
    """Outside every handler: an unforeseen exception becomes a 500 and a log line without its message.

    The framework's own last resort hands the exception on to the server, which prints message and all.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def observed(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception as error:  # the boundary: nothing may leave unformed
            log_failure(error)
            if not started:
                await error_response(internal_error())(scope, receive, send)
