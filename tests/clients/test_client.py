"""Both clients against a scripted server: what they send, what they make of the answers, and that they let go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

import clients
from clients import AsyncClient, Client

Handler = Callable[[httpx.Request], httpx.Response]

MOT = {"private": True, "temperature": 0.1, "live_members": 1, "reference_members": 15, "mixing_entropy": 0.5}
USAGE = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "demo",
    "choices": [
        {
            "index": 0,
            "text": "café",
            "finish_reason": "stop",
            "logprobs": {
                "tokens": ["c", "afé"],
                "token_logprobs": [None, -1.5],
                "top_logprobs": [None, {"afé": -1.5}],
                "text_offset": [0, 1],
            },
        }
    ],
    "usage": USAGE,
    "mot": {**MOT, "a_newer_member": 1},
}
CHAT = {
    "id": "chatcmpl-1",
    "created": 1,
    "model": "demo",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello"},
            "finish_reason": "length",
            "logprobs": {"content": [{"token": "hello", "logprob": -1, "bytes": [104], "top_logprobs": []}]},
        }
    ],
    "mot": MOT,
}
MESSAGES = [{"role": "user", "content": "hi"}]


class Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body in pieces for either client, which remembers whether it was closed."""

    def __init__(self, *pieces: bytes, error: Exception | None = None) -> None:
        self.pieces, self.error = pieces, error
        self.given, self.closed = 0, False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            self.given += 1
            yield piece
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def event(data: object) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def answer(body: object, status: int = 200) -> Handler:
    return lambda request: httpx.Response(status, json=body)


class Sync:
    """Calls a method of Client; streams are read to their end, or as far as ``take`` says."""

    def __call__(self, handler: Handler, name: str, *args: Any, take: int | None = None, **fields: Any) -> Any:
        with Client(transport=httpx.MockTransport(handler), api_key="k") as client:
            result = getattr(client, name)(*args, **fields)
            if not isinstance(result, clients.Stream):
                return result
            with result:
                if take is None:
                    return list(result)
                return [next(result) for _ in range(take)]


class Async:
    """The same for AsyncClient."""

    def __call__(self, handler: Handler, name: str, *args: Any, take: int | None = None, **fields: Any) -> Any:
        return asyncio.run(self._call(handler, name, *args, take=take, **fields))

    async def _call(self, handler: Handler, name: str, *args: Any, take: int | None, **fields: Any) -> Any:
        async with AsyncClient(transport=httpx.MockTransport(handler), api_key="k") as client:
            result = await getattr(client, name)(*args, **fields)
            if not isinstance(result, clients.AsyncStream):
                return result
            async with result:
                if take is None:
                    return [chunk async for chunk in result]
                return [await anext(result) for _ in range(take)]


@pytest.fixture(params=[Sync, Async])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    made: Callable[..., Any] = request.param()
    return made


def test_completions(call: Callable[..., Any]) -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=COMPLETION)

    completion = call(handler, "completions", "Once", private=True, max_tokens=1)
    assert str(seen[0].url) == "http://127.0.0.1:8000/v1/completions"
    assert seen[0].headers["authorization"] == "Bearer k"
    assert json.loads(seen[0].content) == {"prompt": "Once", "private": True, "max_tokens": 1}
    assert completion.text == "café"
    assert completion.usage == clients.Usage(2, 1, 3)
    assert completion.mot == clients.Mot(True, 0.1, 1.0, 15.0, 0.5)
    assert completion.choices[0].logprobs.token_logprobs == (None, -1.5)
    assert completion.choices[0].logprobs.top_logprobs == (None, {"afé": -1.5})


def test_chat(call: Callable[..., Any]) -> None:
    seen: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200, json=CHAT)

    chat = call(handler, "chat", MESSAGES, logprobs=True)
    assert seen == [("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True})]
    assert (chat.text, chat.choices[0].finish_reason, chat.usage) == ("hello", "length", None)
    assert chat.choices[0].logprobs.content[0].logprob == -1


def test_models_tokens_and_probes(call: Callable[..., Any]) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        match request.method, request.url.path:
            case "GET", "/v1/models":
                return httpx.Response(200, json={"object": "list", "data": [{"id": "demo", "mot": {"group": 16}}]})
            case "POST", "/tokenize":
                return httpx.Response(200, json={"tokens": [len(json.loads(request.content)["prompt"])], "count": 1})
            case "POST", "/detokenize":
                return httpx.Response(200, json={"prompt": str(json.loads(request.content)["tokens"])})
            case "GET", "/health":
                return httpx.Response(200)
        return httpx.Response(503)

    assert call(handler, "models") == (clients.Model("demo"),)
    assert call(handler, "tokenize", "abc") == (3,)
    assert call(handler, "detokenize", (1, 2)) == "[1, 2]"
    assert call(handler, "health") is True
    assert call(handler, "ready") is False


def test_streams_however_the_bytes_are_cut(call: Callable[..., Any]) -> None:
    last = {**COMPLETION, "choices": []}
    data = event(COMPLETION) * 2 + event(last) + event(b"[DONE]")
    for size in (1, 7, len(data)):
        body = Chunks(*(data[start : start + size] for start in range(0, len(data), size)))
        chunks = call(lambda request, body=body: httpx.Response(200, stream=body), "stream_completions", "Once", n=2)
        assert "".join(chunk.text for chunk in chunks) == "cafécafé"
        assert chunks[-1].mot.live_members == 1
        assert body.closed


def test_chat_streams(call: Callable[..., Any]) -> None:
    sent: list[Any] = []
    deltas: list[dict[str, str]] = [{"role": "assistant"}, {"content": "hel"}, {"content": "lo"}, {}]
    body = b"".join(event({**CHAT, "choices": [{"index": 0, "delta": delta}]}) for delta in deltas) + event(b"[DONE]")

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, content=body)

    chunks = call(handler, "stream_chat", MESSAGES, stream_options={"include_usage": True})
    assert "".join(chunk.text for chunk in chunks) == "hello"
    assert sent == [{"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}]


@pytest.mark.parametrize("take", [0, 1])
def test_leaving_a_stream_early_closes_the_connection(call: Callable[..., Any], take: int) -> None:
    body = Chunks(*[event(COMPLETION)] * 50)
    chunks = call(lambda request: httpx.Response(200, stream=body), "stream_completions", "Once", take=take)
    assert len(chunks) == take
    assert body.closed
    assert body.given <= take


@pytest.mark.parametrize("name", ["completions", "stream_completions"])
def test_a_refusal_is_raised_at_once(call: Callable[..., Any], name: str) -> None:
    error = {"error": {"message": "`top_p`: too large.", "type": "invalid_request_error", "param": "top_p"}}
    body = Chunks(json.dumps(error).encode())
    with pytest.raises(clients.BadRequestError, match="too large") as caught:
        call(lambda request: httpx.Response(400, stream=body), name, "Once", top_p=2)
    assert caught.value.param == "top_p"
    assert body.closed


def test_an_error_within_a_stream(call: Callable[..., Any]) -> None:
    body = Chunks(event(COMPLETION), event({"error": {"message": "stopped"}}), event(COMPLETION))
    with pytest.raises(clients.APIError, match="stopped"):
        call(lambda request: httpx.Response(200, stream=body), "stream_completions", "Once")
    assert body.closed


def test_a_stream_that_breaks_off_is_an_error(call: Callable[..., Any]) -> None:
    body = Chunks(event(COMPLETION))
    with pytest.raises(clients.ProtocolError, match="may be incomplete"):
        call(lambda request: httpx.Response(200, stream=body), "stream_completions", "Once")
    broken = Chunks(event(COMPLETION), error=httpx.ReadError("reset"))
    with pytest.raises(clients.ConnectionFailedError, match="reset"):
        call(lambda request: httpx.Response(200, stream=broken), "stream_completions", "Once")
    assert body.closed
    assert broken.closed


@pytest.mark.parametrize("name", ["completions", "stream_completions"])
@pytest.mark.parametrize(
    ("raised", "kind"),
    [(httpx.ConnectError("refused"), clients.ConnectionFailedError), (httpx.ReadTimeout(""), clients.TimedOutError)],
)
def test_transport_errors(
    call: Callable[..., Any], name: str, raised: Exception, kind: type[clients.MotserveError]
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise raised

    with pytest.raises(kind) as caught:
        call(handler, name, "Once")
    assert type(caught.value) is kind


def test_answers_that_break_the_contract(call: Callable[..., Any]) -> None:
    wrong = {**COMPLETION, "choices": [{"index": 0, "text": 3}]}
    with pytest.raises(clients.ProtocolError, match=r"choices\.0\.text"):
        call(answer(wrong), "completions", "Once")
    with pytest.raises(clients.ProtocolError, match="not JSON"):
        call(lambda request: httpx.Response(200, content=b"<html>"), "models")


def test_stream_is_not_a_field(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="stream_completions"):
        call(answer(COMPLETION), "completions", "Once", stream=True)


@pytest.mark.parametrize("url", ["http://there:1", "http://there:1/", "http://there:1/v1", "http://there:1/v1/"])
def test_the_address_may_be_the_one_openai_clients_take(url: str) -> None:
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(200, json={"data": []})

    with Client(url, transport=httpx.MockTransport(handler)) as client:
        client.models()
        assert client.health()
    assert seen == ["http://there:1/v1/models", "http://there:1/health"]
