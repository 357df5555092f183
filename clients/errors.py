"""What can go wrong between a client and a server, one class for each thing a caller may do about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_LONGEST_EXCERPT = 200  # of a body that is not OpenAI's error object


class MotserveError(Exception):
    """The root of all that the clients raise."""


class ConnectionFailedError(MotserveError):
    """The server could not be reached, or the connection broke."""


class TimedOutError(ConnectionFailedError):
    """The server was silent for longer than the client's timeout."""


class ProtocolError(MotserveError):
    """The server's answer is not what the API promises."""


class APIError(MotserveError):
    """The server refused or failed, and said so. ``status`` is None when it said so in the middle of a stream.

    ``type``, ``param`` and ``code`` are those of OpenAI's error object; ``param`` names the field at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status = message, status
        self.type, self.param, self.code = type, param, code
        self.retry_after = retry_after  # seconds


class BadRequestError(APIError):
    """400 and every other 4xx without a class of its own: the request cannot be served as it stands."""


class AuthenticationError(APIError):
    """401: no API key, or one that the server does not know."""


class PermissionDeniedError(APIError):
    """403: the key does not allow this."""


class NotFoundError(APIError):
    """404: no such model or path."""


class RequestTooLargeError(APIError):
    """413: the body is larger than the server takes."""


class RateLimitError(APIError):
    """429: too much at once; ``retry_after`` says how long to wait, where the server did."""


class ServerError(APIError):
    """5xx: the server's own failure."""


class UnavailableError(ServerError):
    """503: the server is starting or stopping; trying again later may help."""


_BY_STATUS: Mapping[int, type[APIError]] = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    413: RequestTooLargeError,
    429: RateLimitError,
    503: UnavailableError,
}


def error_from_response(status: int, headers: Mapping[str, str], body: bytes) -> APIError:
    """The error that an answer with any status but 2xx stands for."""
    kind: type[APIError] = APIError
    if 400 <= status < 600:
        kind = _BY_STATUS.get(status, ServerError if status >= 500 else BadRequestError)
    details = _error_object(body)
    return kind(
        details["message"] or f"The server answered {status}: {_excerpt(body)}",
        status=status,
        type=details["type"],
        param=details["param"],
        code=details["code"],
        retry_after=_seconds(headers.get("retry-after")),
    )


def error_from_event(error: object) -> APIError:
    """The error that a server reports within a stream, whose status has already gone out as 200."""
    details = _details(error)
    message = details["message"] or "The server reported an error and did not say which."
    return APIError(message, type=details["type"], param=details["param"], code=details["code"])


def _error_object(body: bytes) -> dict[str, str | None]:
    try:
        parsed = json.loads(body)
    except ValueError:  # also what is not UTF-8
        parsed = None
    return _details(parsed.get("error") if isinstance(parsed, dict) else None)


def _details(error: object) -> dict[str, str | None]:
    """OpenAI's four members. Proxies answer in shapes of their own, so what is not there is None."""
    fields: Mapping[str, Any] = error if isinstance(error, dict) else {"message": error}
    values = {name: fields.get(name) for name in ("message", "type", "param", "code")}
    return {name: None if value is None else str(value) for name, value in values.items()}


def _excerpt(body: bytes) -> str:
    text = " ".join(body.decode(errors="replace").split())
    return text[:_LONGEST_EXCERPT] + "..." if len(text) > _LONGEST_EXCERPT else text or "(nothing)"


def _seconds(value: str | None) -> float | None:
    """Retry-After in its form of seconds; the form of a date is not used by servers such as ours."""
    return float(value) if value is not None and value.isdigit() and value.isascii() else None
