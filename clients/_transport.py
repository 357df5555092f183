"""HTTP/1.1 for answers that come in very many small pieces, over asyncio's own streams.

httpx's own transport took most of 250 µs of processor time a piece (measured on a slow core; with this one it is 100 in
all) and made the first pieces of many streams wait for one another, which is much where the load generator shares a
machine with the server. This one has what load needs: no proxies, no HTTP/2; GET and POST.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx

# Less than servers keep idle connections (uvicorn: 5 s): one closed just as it is reused would look like an error.
_IDLE_SECONDS = 2.0
_LARGEST_HEAD = _PIECE = 2**16  # bytes


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    origin: tuple[str, str, int | None]
    idle_since: float = 0.0

    @property
    def usable(self) -> bool:
        fresh = time.monotonic() - self.idle_since < _IDLE_SECONDS
        return fresh and not self.reader.at_eof() and not self.writer.is_closing()


@dataclass(frozen=True)
class _Head:
    """``length`` None: chunked, or else until the connection closes. ``keep``: the server takes another request."""

    status: int
    headers: list[tuple[bytes, bytes]]
    chunked: bool
    length: int | None
    keep: bool


class AnswerTransport(httpx.AsyncBaseTransport):
    """As many connections as there are requests under way; idle ones are used again."""

    def __init__(self) -> None:
        self._idle: list[_Connection] = []
        self._tls: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        limits = request.extensions.get("timeout", {})
        connection = await self._connect(request.url, limits.get("connect"))
        try:
            with _httpx_errors(httpx.ReadError, httpx.ReadTimeout):
                async with asyncio.timeout(limits.get("read")):
                    lines = [request.method.encode() + b" " + request.url.raw_path + b" HTTP/1.1"]
                    lines += [name + b": " + value for name, value in request.headers.raw]
                    connection.writer.write(b"\r\n".join(lines) + b"\r\n\r\n" + await request.aread())
                    await connection.writer.drain()
                    head = await _read_head(connection.reader)
        except BaseException:
            connection.writer.close()
            raise
        body = _Body(connection, head, limits.get("read"), self._idle)
        return httpx.Response(head.status, headers=head.headers, stream=body)

    async def _connect(self, url: httpx.URL, seconds: float | None) -> _Connection:
        origin = (url.scheme, url.host, url.port)
        while self._idle:
            connection = self._idle.pop()
            if connection.origin == origin and connection.usable:
                return connection
            connection.writer.close()
        if url.scheme == "https" and self._tls is None:
            self._tls = ssl.create_default_context()
        port = url.port or (443 if url.scheme == "https" else 80)
        with _httpx_errors(httpx.ConnectError, httpx.ConnectTimeout):
            async with asyncio.timeout(seconds):
                streams = await asyncio.open_connection(
                    url.host, port, limit=_LARGEST_HEAD, ssl=self._tls if url.scheme == "https" else None
                )
        return _Connection(*streams, origin)

    async def aclose(self) -> None:
        for connection in self._idle:
            connection.writer.close()
        self._idle.clear()


class _Body(httpx.AsyncByteStream):
    """Pieces as they come. Read to its end, its connection goes back to ``idle``."""

    def __init__(self, connection: _Connection, head: _Head, timeout: float | None, idle: list[_Connection]) -> None:
        self._connection, self._head, self._timeout, self._idle = connection, head, timeout, idle
        self._left = head.length
        self._whole = head.length == 0
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _httpx_errors(httpx.ReadError, httpx.ReadTimeout):
            while not self._whole:
                async with asyncio.timeout(self._timeout):
                    piece = await (self._next_chunk() if self._head.chunked else self._next_bytes())
                if piece:
                    yield piece

    async def aclose(self) -> None:
        """Idempotent: a connection that was given back may be somebody else's by now."""
        if self._closed:
            return
        self._closed = True
        if self._whole and self._head.keep:
            self._connection.idle_since = time.monotonic()
            self._idle.append(self._connection)
        else:
            self._connection.writer.close()

    async def _next_chunk(self) -> bytes:
        reader = self._connection.reader
        size = int((await reader.readline()).partition(b";")[0], 16)  # nothing, at an early end, is no number
        if size > 0:
            return (await reader.readexactly(size + 2))[:-2]
        while (await reader.readline()).strip():  # trailers
            pass
        self._whole = True
        return b""

    async def _next_bytes(self) -> bytes:
        piece = await self._connection.reader.read(_PIECE if self._left is None else min(_PIECE, self._left))
        if self._left is not None:
            if not piece:
                raise asyncio.IncompleteReadError(b"", self._left)
            self._left -= len(piece)
        self._whole = self._left == 0 or not piece
        return piece


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    """Of the answer; interim ones (1xx) are passed over. Raises ValueError and what asyncio's readers raise."""
    status = 100
    while 100 <= status < 200:
        first, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
        version, _, rest = first.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            raise ValueError("no HTTP/1 answer")
        status = int(rest[:3])
    headers = [(name.strip(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    known = {name.lower(): value.lower() for name, value in headers}
    chunked = known.get(b"transfer-encoding", b"").endswith(b"chunked")
    length = int(known[b"content-length"]) if b"content-length" in known and not chunked else None
    if status in (204, 304):
        chunked, length = False, 0
    framed = chunked or length is not None
    keep = framed and version == b"HTTP/1.1" and known.get(b"connection") != b"close"
    return _Head(status, headers, chunked, length, keep)


@contextlib.contextmanager
def _httpx_errors(broken: type[httpx.TransportError], late: type[httpx.TransportError]) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise late("") from None
    except OSError as error:
        raise broken(str(error)) from error
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
        raise httpx.RemoteProtocolError(f"The answer broke off or is no HTTP/1 ({error}).") from error
