"""The load generator's transport against byte-for-byte scripted servers: framings, reuse, what goes wrong."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients._transport import AnswerTransport

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%X;a=b\r\n%b\r\n" % (len(p), p) for p in pieces) + end
    )


class Server:
    """Answers every request with ``pieces``, and closes the connection after ``answers`` of them."""

    def __init__(self, *pieces: bytes, answers: int = 100) -> None:
        self.pieces, self.answers = pieces, answers
        self.connections, self.requests = 0, list[bytes]()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        for _ in range(self.answers):
            head = await reader.read(65536)
            if not head:
                break
            self.requests.append(head)
            for piece in self.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
        writer.close()

    def run(self, use: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]], timeout: float = 5.0) -> Any:
        async def main() -> Any:
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            async with server, httpx.AsyncClient(base_url=url, transport=AnswerTransport(), timeout=timeout) as http:
                return await use(http)

        return asyncio.run(main())


async def get(http: httpx.AsyncClient) -> httpx.Response:
    return await http.post("/a?b=c", content=b"body")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=30), max_size=4), st.lists(st.integers(0, 400), max_size=5))
def test_chunks_arrive_whole_however_the_network_cuts_them(pieces: list[bytes], places: list[int]) -> None:
    data = chunked(*pieces)
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    server = Server(*(data[a:b] for a, b in itertools.pairwise(edges) if a < b))

    async def use(http: httpx.AsyncClient) -> list[bytes]:
        async with http.stream("POST", "/", content=b"x") as response:
            return [piece async for piece in response.aiter_raw()]

    assert server.run(use) == pieces


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 5\r\n\r\nhello",
        HEAD + b"content-length:5\r\n\r\nhello",
        b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: 5\r\n\r\nhello",
        chunked(b"he", b"llo", end=b"0\r\nTrailer: x\r\n\r\n"),
    ],
)
def test_a_connection_is_used_again(data: bytes) -> None:
    server = Server(data)

    async def use(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [await get(http) for _ in range(3)]

    answers = server.run(use)
    assert [(answer.status_code, answer.content) for answer in answers] == [(200, b"hello")] * 3
    assert server.connections == 1
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /a?b=c HTTP/1.1\r\n") and body == b"body"
    assert b"host: 127.0.0.1:" in head.lower() and b"content-length: 4" in head.lower()


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"\r\nhello",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        HEAD + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
def test_a_connection_that_ends_is_not(data: bytes) -> None:
    server = Server(data, answers=1)

    async def use(http: httpx.AsyncClient) -> list[bytes]:
        return [(await get(http)).content for _ in range(2)]

    assert server.run(use) == [b"hello"] * 2
    assert server.connections == 2


def test_nor_one_whose_answer_was_not_read() -> None:
    server = Server(chunked(b"x" * 10, b"y" * 10))

    async def use(http: httpx.AsyncClient) -> bytes:
        async with http.stream("POST", "/", content=b"x") as response:
            async for _ in response.aiter_raw():
                break
        return (await get(http)).content

    assert server.run(use) == b"x" * 10 + b"y" * 10
    assert server.connections == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 what\r\n\r\n",
        HEAD + b"x" * 70_000,
        HEAD + b"Content-Length: 9\r\n\r\nhello",
        HEAD + b"Content-Length: many\r\n\r\n",
        chunked(b"hello", end=b""),
        chunked(b"hello", end=b"9\r\nhel"),
        chunked(b"hello", end=b"zz\r\n"),
    ],
)
def test_a_broken_answer_is_httpx_error(data: bytes) -> None:
    with pytest.raises(httpx.TransportError):
        Server(data, answers=1).run(get)


@pytest.mark.parametrize("data", [HEAD, HEAD + b"Content-Length: 9\r\n\r\nhello", chunked(b"hello", end=b"")])
def test_silence_is_a_timeout(data: bytes) -> None:
    with pytest.raises(httpx.ReadTimeout):
        Server(data).run(get, timeout=0.05)


def test_nobody_there() -> None:
    async def use() -> None:
        async with httpx.AsyncClient(transport=AnswerTransport()) as http:
            await http.get("http://127.0.0.1:1/")

    with pytest.raises(httpx.ConnectError):
        asyncio.run(use())
