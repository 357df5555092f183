"""Limits on what a client may send, held before anything reads it.

Plain ASGI: a body is counted as it arrives, declared or chunked, and never held here. Knows no routes.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine.request import RequestError
from server.errors import error_response


class _BodyTooLarge(Exception):
    """Unwinds the handler that was reading."""


class BodyLimit:
    """Refuses request bodies above ``max_bytes`` with 413: by their Content-Length at once, and otherwise as soon as
    that many bytes have come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _declared_length(scope) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise _BodyTooLarge
            return message

        try:
            await self._app(scope, counted, send)
        except _BodyTooLarge:  # only reading raises it, and handlers read everything before they answer
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"The request body is larger than this server's limit of {self._max_bytes} bytes."
        await error_response(RequestError(message, param=None, status=413))(scope, receive, send)


def _declared_length(scope: Scope) -> int:
    """Content-Length, or 0 where there is none that can be read."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0
