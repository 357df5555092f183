"""The client and its asynchronous twin. All they do is I/O: what is sent and what the answers mean is shared.

Nothing is retried: a request that was cut off may have run, and only the caller knows whether that matters.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, Self, TypeVar, Unpack

import httpx

from clients import _calls, types
from clients._calls import Call
from clients._streaming import ChunkDecoder
from clients.errors import ConnectionFailedError, TimedOutError, error_from_response

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_SECONDS = 5.0


class _Settings:
    """What both clients are made with."""

    def __init__(self, base_url: str, api_key: str | None, timeout: float) -> None:
        # OpenAI's clients are given the address with /v1, and people will copy it from there.
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.timeout = httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS))


@contextmanager
def _transport_errors() -> Iterator[None]:
    """httpx's errors as ours, so that callers need to know one family only."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise TimedOutError(f"The server did not answer in time ({type(error).__name__}).") from error
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise ConnectionFailedError(f"No connection to the server: {error or type(error).__name__}") from error


def _read_answer(call: Call[T], response: httpx.Response) -> T:
    _check(response)
    return call.read(response.content)


def _check(response: httpx.Response) -> None:
    """The body must have been read."""
    if not response.is_success:
        raise error_from_response(response.status_code, response.headers, response.content)


class Stream(Generic[T]):
    """Chunks as they come. Close it, or leave its ``with`` block, to end early: the server then stops generating."""

    def __init__(self, call: Call[T], response: httpx.Response) -> None:
        self._response = response
        self._chunks = self._read(call)

    def _read(self, call: Call[T]) -> Generator[T]:
        decoder = ChunkDecoder()
        try:
            with _transport_errors():
                for chunk in self._response.iter_bytes():
                    for data in decoder.feed(chunk):
                        yield types.read(call.answer, data)
            decoder.finish()
        finally:
            self._response.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return next(self._chunks)

    def close(self) -> None:
        """Idempotent. The response too, since a generator that was never started runs no ``finally``."""
        self._chunks.close()
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream(Generic[T]):
    """Stream's asynchronous twin."""

    def __init__(self, call: Call[T], response: httpx.Response) -> None:
        self._response = response
        self._chunks = self._read(call)

    async def _read(self, call: Call[T]) -> AsyncGenerator[T]:
        decoder = ChunkDecoder()
        try:
            with _transport_errors():
                async for chunk in self._response.aiter_bytes():
                    for data in decoder.feed(chunk):
                        yield types.read(call.answer, data)
            decoder.finish()
        finally:
            await self._response.aclose()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Idempotent."""
        await self._chunks.aclose()
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class Client:
    """A motserve server. ``timeout`` is how many seconds it may be silent."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        made = _Settings(base_url, api_key, timeout)
        self._http = httpx.Client(
            base_url=made.base_url, headers=made.headers, timeout=made.timeout, transport=transport
        )

    def completions(self, prompt: types.Prompt, **fields: Unpack[types.CompletionFields]) -> types.Completion:
        return self._send(_calls.completion(prompt, fields))

    def stream_completions(
        self, prompt: types.Prompt, **fields: Unpack[types.CompletionFields]
    ) -> Stream[types.Completion]:
        return self._stream(_calls.completion_stream(prompt, fields))

    def chat(self, messages: Sequence[types.Message], **fields: Unpack[types.ChatFields]) -> types.ChatCompletion:
        return self._send(_calls.chat(messages, fields))

    def stream_chat(
        self, messages: Sequence[types.Message], **fields: Unpack[types.ChatFields]
    ) -> Stream[types.ChatChunk]:
        return self._stream(_calls.chat_stream(messages, fields))

    def models(self) -> tuple[types.Model, ...]:
        return self._send(_calls.MODELS).data

    def tokenize(self, text: str) -> tuple[int, ...]:
        return self._send(_calls.tokenize(text)).tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self._send(_calls.detokenize(tokens)).prompt

    def health(self) -> bool:
        """The server is alive. False when it says that it is not; raises when it cannot be reached."""
        return self._probe("/health")

    def ready(self) -> bool:
        """The server takes requests now."""
        return self._probe("/ready")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _probe(self, path: str) -> bool:
        with _transport_errors():
            return self._http.get(path).is_success

    def _send(self, call: Call[T]) -> T:
        with _transport_errors():
            response = self._http.request(call.method, call.path, json=call.body)
        return _read_answer(call, response)

    def _stream(self, call: Call[T]) -> Stream[T]:
        with _transport_errors():
            response = self._http.send(self._http.build_request(call.method, call.path, json=call.body), stream=True)
            if not response.is_success:
                response.read()  # which closes it
        _check(response)
        return Stream(call, response)


class AsyncClient:
    """Client's asynchronous twin."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        made = _Settings(base_url, api_key, timeout)
        self._http = httpx.AsyncClient(
            base_url=made.base_url, headers=made.headers, timeout=made.timeout, transport=transport
        )

    async def completions(self, prompt: types.Prompt, **fields: Unpack[types.CompletionFields]) -> types.Completion:
        return await self._send(_calls.completion(prompt, fields))

    async def stream_completions(
        self, prompt: types.Prompt, **fields: Unpack[types.CompletionFields]
    ) -> AsyncStream[types.Completion]:
        return await self._stream(_calls.completion_stream(prompt, fields))

    async def chat(self, messages: Sequence[types.Message], **fields: Unpack[types.ChatFields]) -> types.ChatCompletion:
        return await self._send(_calls.chat(messages, fields))

    async def stream_chat(
        self, messages: Sequence[types.Message], **fields: Unpack[types.ChatFields]
    ) -> AsyncStream[types.ChatChunk]:
        return await self._stream(_calls.chat_stream(messages, fields))

    async def models(self) -> tuple[types.Model, ...]:
        return (await self._send(_calls.MODELS)).data

    async def tokenize(self, text: str) -> tuple[int, ...]:
        return (await self._send(_calls.tokenize(text))).tokens

    async def detokenize(self, tokens: Sequence[int]) -> str:
        return (await self._send(_calls.detokenize(tokens))).prompt

    async def health(self) -> bool:
        """The server is alive. False when it says that it is not; raises when it cannot be reached."""
        return await self._probe("/health")

    async def ready(self) -> bool:
        """The server takes requests now."""
        return await self._probe("/ready")

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _probe(self, path: str) -> bool:
        with _transport_errors():
            return (await self._http.get(path)).is_success

    async def _send(self, call: Call[T]) -> T:
        with _transport_errors():
            response = await self._http.request(call.method, call.path, json=call.body)
        return _read_answer(call, response)

    async def _stream(self, call: Call[T]) -> AsyncStream[T]:
        with _transport_errors():
            response = await self._http.send(
                self._http.build_request(call.method, call.path, json=call.body), stream=True
            )
            if not response.is_success:
                await response.aread()  # which closes it
        _check(response)
        return AsyncStream(call, response)
