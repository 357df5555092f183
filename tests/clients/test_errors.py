"""One class for each thing a caller may do about an error, whoever sent it."""

from __future__ import annotations

import json

import pytest

import clients
from clients.errors import APIError, error_from_event, error_from_response


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, clients.BadRequestError),
        (401, clients.AuthenticationError),
        (403, clients.PermissionDeniedError),
        (404, clients.NotFoundError),
        (405, clients.BadRequestError),
        (413, clients.RequestTooLargeError),
        (429, clients.RateLimitError),
        (500, clients.ServerError),
        (503, clients.UnavailableError),
        (504, clients.ServerError),
        (302, APIError),
    ],
)
def test_each_status_has_its_class(status: int, kind: type[APIError]) -> None:
    body = {"error": {"message": "no", "type": "t", "param": "top_p", "code": "invalid_value"}}
    error = error_from_response(status, {}, json.dumps(body).encode())
    assert type(error) is kind
    assert isinstance(error, clients.MotserveError)
    assert (error.status, str(error), error.type, error.param, error.code) == (
        status,
        "no",
        "t",
        "top_p",
        "invalid_value",
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The server answered 502: (nothing)"),
        (b"<html>\n <b>Bad Gateway", "The server answered 502: <html> <b>Bad Gateway"),
        (b"\xff\xfe", "The server answered 502: \ufffd\ufffd"),
        (b"[1]", "The server answered 502: [1]"),
        (b'{"error": "busy"}', "busy"),
        (b'{"error": {"message": 3}}', "3"),
        (b"x" * 300, "The server answered 502: " + "x" * 200 + "..."),
    ],
)
def test_bodies_of_others_still_say_something(body: bytes, message: str) -> None:
    assert str(error_from_response(502, {}, body)) == message


@pytest.mark.parametrize(("value", "seconds"), [("7", 7.0), ("Wed, 21 Oct 2015 07:28:00 GMT", None), ("-1", None)])
def test_retry_after(value: str, seconds: float | None) -> None:
    assert error_from_response(429, {"retry-after": value}, b"").retry_after == seconds


def test_an_error_within_a_stream_has_no_status() -> None:
    error = error_from_event({"message": "engine stopped", "code": "engine_stopped"})
    assert (error.status, error.message, error.code) == (None, "engine stopped", "engine_stopped")
    assert str(error_from_event(None)) == "The server reported an error and did not say which."
