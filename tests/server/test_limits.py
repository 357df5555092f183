"""The body limit, over a socket and message by message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.server.conftest import Live

PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


@pytest.fixture
def small(serve: Callable[..., Live]) -> Live:
    return serve(max_body_bytes=1000)


def assert_too_large(response: Any) -> None:
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("path", PATHS)
def test_a_declared_body(small: Live, path: str) -> None:
    assert_too_large(small.client.post(path, content=b"x" * 1001))
    assert small.client.post(path, content=b"x" * 1000).status_code == 400


@pytest.mark.parametrize("path", PATHS)
def test_a_chunked_body(small: Live, path: str) -> None:
    def chunks(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield b"x" * 100

    assert_too_large(small.client.post(path, content=chunks(11)))
    assert small.client.post(path, content=chunks(10)).status_code == 400


def test_a_body_far_beyond_the_limit_and_the_connection_after_it(small: Live) -> None:
    assert_too_large(small.client.post("/v1/completions", content=b"x" * 3_000_000))
    assert small.post("/v1/completions", prompt="Once", max_tokens=1).status_code == 200
