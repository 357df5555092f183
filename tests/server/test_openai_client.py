"""OpenAI's own client against the server: what most people will use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from server.engine.async_engine import EngineStopped
from server.engine.request import RequestError
from tests.server.conftest import Live

CHAT: Any = [{"role": "user", "content": "Hello"}]


def client_of(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return client_of(live)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["a", "b"], n=2, max_tokens=3, logprobs=2, extra_body={"private": True}
    )
    assert [choice.text for choice in answer.choices] == ["Once the"] * 4
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == ["On", "ce", " the"]
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert answer.model_extra is not None and answer.model_extra["mot"]["private"] is True


def test_completion_stream(client: openai.OpenAI) -> None:
    texts, usage = ["", ""], None
    for chunk in client.completions.create(
        model="tiny", prompt="a", n=2, max_tokens=5, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts[0] == texts[1] and texts[0].startswith("Once the")
    assert usage is not None and usage.completion_tokens == 10


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=3, n=2, logprobs=True, top_logprobs=2
    )
    assert [choice.message.content for choice in answer.choices] == ["Once the"] * 2
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [len(token.top_logprobs) for token in logprobs.content] == [2, 2, 2]


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=CHAT, max_completion_tokens=3, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Once the"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].model_extra is not None and chunks[-1].model_extra["mot"]["group_fill"] == "reference"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "motserve"


def test_a_client_that_closes_its_stream(live: Live, client: openai.OpenAI) -> None:
    live.engine.delay = 0.01
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=60, stream=True)
    next(iter(stream))
    stream.close()
    assert client.models.retrieve("tiny").id == "tiny"  # and the connection pool goes on


def test_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", extra_body={"surprise": 1})
    assert (caught.value.param, caught.value.code) == ("surprise", "unknown_parameter")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=CHAT, response_format={"type": "json_object"})
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=100)
    assert caught.value.code == "context_length_exceeded"


def test_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="a")


def test_too_large_and_too_many(live: Live, serve: Callable[..., Live]) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client_of(serve(max_body_bytes=100)).completions.create(model="tiny", prompt="a" * 200)
    assert caught.value.status_code == 413
    live.engine.refuse = RequestError("The queue is full.", param=None, status=429)
    with pytest.raises(openai.RateLimitError):
        client_of(live).completions.create(model="tiny", prompt="a")


@pytest.mark.parametrize("failure", [EngineStopped(), ValueError("broken")])
def test_server_errors(live: Live, client: openai.OpenAI, failure: Exception) -> None:
    live.engine.fail_after, live.engine.failure = 1, failure
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="a")
    with pytest.raises(openai.APIError) as caught:
        list(client.completions.create(model="tiny", prompt="a", stream=True))
    assert not isinstance(caught.value, openai.APIStatusError)  # told inside the stream
