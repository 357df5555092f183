"""The endpoints, over a socket, in front of the scripted engine."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from model.tokenizer import END_OF_TEXT, Tokenizer
from server.engine.async_engine import EngineStopped
from server.engine.request import Privacy, RequestError
from tests.server.conftest import Live, wait_until
from tests.server.fake_engine import STORY

SECRET = "xyzzy-never-repeat"
CHAT = [{"role": "user", "content": "Once"}]


def events(live: Live, path: str, **body: Any) -> list[Any]:
    """What a stream sends, decoded; the last one is ``[DONE]`` unless it broke off."""
    response = live.post(path, stream=True, **body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert SECRET not in response.text
    return error


def joined(chunks: list[Any], name: str, index: int = 0) -> list[Any]:
    """One member of every chunk of a choice."""
    choices = [choice for chunk in chunks[:-1] for choice in chunk["choices"] if choice["index"] == index]
    return [choice[name] for choice in choices if name in choice]


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 30])
def test_a_stream_is_the_plain_answer_in_pieces(live: Live, max_tokens: int) -> None:
    body: dict[str, Any] = {
        "prompt": ["Once", "the sea"],
        "n": 2,
        "max_tokens": max_tokens,
        "logprobs": 2,
        "echo": True,
        "return_token_ids": True,
    }
    plain = live.post("/v1/completions", **body).json()
    chunks = events(live, "/v1/completions", **body)
    assert chunks[-1] == "[DONE]"
    for choice in plain["choices"]:
        index = choice["index"]
        assert "".join(joined(chunks, "text", index)) == choice["text"]
        assert flat(joined(chunks, "token_ids", index)) == choice["token_ids"]
        assert joined(chunks, "prompt_token_ids", index) == [choice["prompt_token_ids"]]
        for name in choice["logprobs"]:
            parts = [part[name] for part in joined(chunks, "logprobs", index) if part]
            assert flat(parts) == choice["logprobs"][name]
        assert [reason for reason in joined(chunks, "finish_reason", index) if reason] == ["length"]
        assert joined(chunks, "mot", index) == [choice["mot"]]
    assert chunks[-2]["mot"] == plain["mot"]
    assert all("usage" not in chunk and "mot" not in chunk for chunk in chunks[:-2])


def test_plain_completion(live: Live, tokenizer: Tokenizer) -> None:
    length = len(tokenizer.encode(STORY))
    answer = live.post("/v1/completions", model="tiny", prompt=["Once", "the"], n=2, max_tokens=length).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-") and answer["model"] == "tiny"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["text"] == STORY for choice in answer["choices"])
    assert all(choice["logprobs"] is None and "token_ids" not in choice for choice in answer["choices"])
    prompt = len(tokenizer.encode("Once")) + len(tokenizer.encode("the"))
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 4 * length,
        "total_tokens": prompt + 4 * length,
    }
    assert [choice["mot"]["live_members"] for choice in answer["choices"]] == [2, 3, 4, 5]
    assert answer["mot"]["live_members"] == 3.5
    assert answer["mot"].keys() == {
        "private",
        "temperature",
        "live_members",
        "reference_members",
        "mixing_entropy",
        "group_fill",
    }


def test_echo_scores_the_prompt(live: Live, tokenizer: Tokenizer) -> None:
    prompt = "a café!"
    for body in ({"prompt": prompt}, {"prompt": tokenizer.encode(prompt)}):
        answer = live.post("/v1/completions", **body, max_tokens=0, echo=True, logprobs=1).json()
        choice = answer["choices"][0]
        ids = tokenizer.encode(prompt)
        assert choice["text"] == prompt and choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == len(ids)
        assert choice["logprobs"]["token_logprobs"] == [None, *[-3.0] * (len(ids) - 1)]
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert all(len(top) == 2 for top in choice["logprobs"]["top_logprobs"][1:])
        assert choice["logprobs"]["text_offset"][-1] == prompt.index("!")
        assert answer["usage"]["completion_tokens"] == 0
        streamed = events(live, "/v1/completions", **body, max_tokens=0, echo=True, logprobs=1)
        assert len(streamed) == 2 and streamed[0]["choices"][0]["logprobs"] == choice["logprobs"]


def test_echo_without_logprobs_and_offsets_after_it(live: Live) -> None:
    plain = live.post("/v1/completions", prompt="Once", max_tokens=2, echo=True).json()["choices"][0]
    assert plain["text"] == "OnceOnce" and plain["logprobs"] is None
    scored = live.post("/v1/completions", prompt="Once", max_tokens=2, echo=True, logprobs=0).json()["choices"][0]
    assert [scored["text"][offset:] for offset in scored["logprobs"]["text_offset"]] == [
        "OnceOnce",
        "ceOnce",
        "Once",
        "ce",
    ]
    assert all(len(top) == 1 for top in scored["logprobs"]["top_logprobs"][1:])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_in_streams(live: Live, path: str) -> None:
    prompt = {"prompt": "Once"} if path == "/v1/completions" else {"messages": CHAT}
    plain = live.post(path, **prompt, max_tokens=3).json()
    chunks = events(live, path, **prompt, max_tokens=3, stream_options={"include_usage": True})
    assert chunks[-2]["choices"] == [] and chunks[-2]["usage"] == plain["usage"]
    assert chunks[-2]["mot"] == chunks[-3]["mot"] == plain["mot"]
    assert all(chunk["usage"] is None for chunk in chunks[:-2])


def test_chat(live: Live) -> None:
    body: dict[str, Any] = {"messages": CHAT, "n": 2, "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2}
    answer = live.post("/v1/chat/completions", **body).json()
    assert answer["object"] == "chat.completion"
    chunks = events(live, "/v1/chat/completions", **body)
    for choice in answer["choices"]:
        assert choice["message"] == {"role": "assistant", "content": "Once the", "refusal": None}
        deltas = joined(chunks, "delta", choice["index"])
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == "Once the"
        content = choice["logprobs"]["content"]
        assert bytes(flat(token["bytes"] for token in content)).decode() == "Once the"
        assert all(len(token["top_logprobs"]) == 2 for token in content)
        parts = [part["content"] for part in joined(chunks, "logprobs", choice["index"]) if part]
        assert flat(parts) == content
    assert {chunk["object"] for chunk in chunks[:-1]} == {"chat.completion.chunk"}


def test_a_chat_may_take_what_is_left(live: Live) -> None:
    live.post("/v1/chat/completions", messages=CHAT)
    request = live.engine.requests[-1]
    assert request.sampling.max_tokens == live.engine.info.max_positions - len(request.prompts[0])


def test_completions_default_to_16_tokens_or_what_is_left(live: Live) -> None:
    live.post("/v1/completions", prompt=[1, 2, 3])
    live.post("/v1/completions", prompt=[1] * 60)
    assert [request.sampling.max_tokens for request in live.engine.requests] == [16, 4]


def test_sampling_reaches_the_engine(live: Live) -> None:
    fields = {"temperature": 0.5, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.1}
    fields |= {"frequency_penalty": 0.2, "seed": 7, "min_tokens": 2, "ignore_eos": True, "max_tokens": 4}
    more = {"top_k": -1, "logit_bias": {"5": 1}, "stop": "x", "stop_token_ids": [9], "priority": 3, "user": SECRET}
    assert live.post("/v1/completions", prompt="Once", **fields, **more).status_code == 200
    sampling = live.engine.requests[-1].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.top_k, sampling.stop, sampling.stop_token_ids) == (0, ("x",), (9,))
    assert sampling.logit_bias == {5: 1.0}
    assert live.engine.requests[-1].priority == 3
    assert SECRET not in repr(live.engine.requests[-1])


def test_an_empty_prompt_starts_after_end_of_text(live: Live, tokenizer: Tokenizer) -> None:
    answer = live.post("/v1/completions", prompt="", max_tokens=2, echo=True, logprobs=0).json()
    assert live.engine.requests[-1].prompts == ((tokenizer.id_of(END_OF_TEXT),),)
    assert answer["choices"][0]["text"] == "Once"
    assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 0, 2]


PRIVACY: list[tuple[str, dict[str, Any], Privacy | str | None]] = [
    ("default-off", {}, None),
    ("default-off", {"private": False}, None),
    ("default-off", {"private": True}, Privacy(0.25, 0.01)),
    ("default-off", {"private": True, "private_temperature": 0}, Privacy(0, 0.01)),
    ("default-off", {"private": True, "private_temperature": 0.5}, Privacy(0.5, 0.01)),
    ("default-off", {"private": True, "private_temperature": 0.6}, "private_temperature"),
    ("default-off", {"private_temperature": 0.1}, "private_temperature"),
    ("default-on", {}, Privacy(0.25, 0.01)),
    ("default-on", {"private": False}, None),
    ("default-on", {"private": False, "private_temperature": 0.1}, "private_temperature"),
    ("force", {"private_temperature": 0.1}, Privacy(0.1, 0.01)),
    ("force", {"private": True}, Privacy(0.25, 0.01)),
    ("force", {"private": False}, "private"),
]


def test_privacy(serve: Callable[..., Live]) -> None:
    servers = {setting: serve(private=setting) for setting in ("default-off", "default-on", "force")}
    for setting, fields, expected in PRIVACY:
        live = servers[setting]
        for path, prompt in (("/v1/completions", {"prompt": "Once"}), ("/v1/chat/completions", {"messages": CHAT})):
            response = live.post(path, **prompt, max_tokens=1, **fields)
            if isinstance(expected, str):
                assert error_of(response, 400)["param"] == expected
            else:
                assert live.engine.requests[-1].privacy == expected
                assert response.json()["mot"]["private"] == (expected is not None)


def test_a_checkpoint_without_a_tokenizer(serve: Callable[..., Live]) -> None:
    live = serve(tokenizer=None)
    body: dict[str, Any] = {"prompt": [[1, 2], [3, 4]], "max_tokens": 3, "logprobs": 1, "echo": True}
    answer = live.post("/v1/completions", **body).json()
    for choice, prompt in zip(answer["choices"], body["prompt"], strict=True):
        assert (choice["text"], choice["token_ids"], choice["prompt_token_ids"]) == ("", [7, 8, 9], prompt)
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in (*prompt, 7, 8, 9)]
        assert choice["logprobs"]["text_offset"] == [0] * 5
    chunks = events(live, "/v1/completions", prompt=[1], max_tokens=3)
    assert flat(joined(chunks, "token_ids")) == [7, 8, 9]
    for path, fields, param in (
        ("/v1/completions", {"prompt": "Once"}, "prompt"),
        ("/v1/completions", {"prompt": [1], "stop": "x"}, "stop"),
        ("/v1/chat/completions", {"messages": CHAT}, "messages"),
        ("/tokenize", {"prompt": "x"}, "prompt"),
        ("/detokenize", {"tokens": [1]}, "tokens"),
    ):
        assert error_of(live.post(path, **fields), 400)["param"] == param


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [-1], "echo": True}, "prompt"),
    ({"logit_bias": {"280": 1}}, "logit_bias"),
    ({"stop_token_ids": [280]}, "stop_token_ids"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    ({"cache_salt": SECRET}, "cache_salt"),
    ({"surprise": SECRET}, "surprise"),
    ({"temperature": SECRET}, "temperature"),
    ({"private": SECRET}, "private"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_VALUES)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_values_are_named(live: Live, fields: dict[str, Any], param: str, stream: bool) -> None:
    error = error_of(live.post("/v1/completions", **{"prompt": SECRET, "stream": stream, **fields}), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"


def test_too_long(live: Live) -> None:
    error = error_of(live.post("/v1/completions", prompt=[1] * 65), 400)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    error = error_of(live.post("/v1/chat/completions", messages=[{"role": "user", "content": "x!" * 65}]), 400)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert "prompt" not in error["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_bodies_that_are_no_json(live: Live, path: str) -> None:
    for body in (b"", b"{", f'["{SECRET}"]'.encode(), b'{"prompt": NaN}', b"\xff"):
        error_of(live.client.post(path, content=body), 400)


def test_content_type_does_not_matter(live: Live) -> None:
    body = json.dumps({"prompt": "Once", "max_tokens": 1})
    response = live.client.post("/v1/completions", content=body, headers={"content-type": "text/plain"})
    assert response.status_code == 200


def test_unknown_models_paths_and_methods(live: Live) -> None:
    for path, fields in (
        ("/v1/completions", {"prompt": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": []}),
    ):
        error = error_of(live.post(path, model=SECRET, **fields), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    for model in ("other", f"a/{SECRET}"):
        assert error_of(live.client.get(f"/v1/models/{model}"), 404)["code"] == "model_not_found"
    for path in ("/", f"/{SECRET}", "/v1/completions/", "/docs", "/openapi.json"):
        error_of(live.client.get(path), 404)
    response = live.client.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    error_of(live.client.post("/v1/models"), 405)


def test_queue_full(live: Live) -> None:
    live.engine.refuse = RequestError("The queue is full.", param=None, status=429)
    response = live.post("/v1/completions", prompt="x")
    assert error_of(response, 429)["code"] == "rate_limit_exceeded"
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(("failure", "status"), [(EngineStopped(), 503), (ValueError(SECRET), 500)])
def test_failures_under_way(live: Live, failure: Exception, status: int, caplog: pytest.LogCaptureFixture) -> None:
    live.engine.fail_after, live.engine.failure = 2, failure
    assert error_of(live.post("/v1/completions", prompt=SECRET, max_tokens=5), status)["type"] == "server_error"
    chunks = events(live, "/v1/completions", prompt=SECRET, max_tokens=5)
    assert chunks[-1]["error"]["type"] == "server_error" and len(chunks) == 3
    assert len(live.engine.aborted) == 2
    assert SECRET not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_time_out(serve: Callable[..., Live], stream: bool) -> None:
    live = serve(request_timeout=0.3)
    live.engine.delay = 0.1
    if stream:
        chunks = events(live, "/v1/completions", prompt="x", max_tokens=50)
        assert chunks[0]["choices"] and chunks[-1]["error"]["code"] == "request_timeout"
    else:
        response = live.post("/v1/completions", prompt="x", max_tokens=50)
        assert error_of(response, 504)["code"] == "request_timeout"
        assert response.headers["x-should-retry"] == "false"
    assert live.engine.aborted == [live.engine.requests[0].request_id]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("delay", [0.02, 30.0])
def test_a_client_that_goes_away(live: Live, stream: bool, delay: float) -> None:
    live.engine.delay = delay
    body = {"prompt": "x", "max_tokens": 60, "stream": stream}
    host, port = live.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        wait_until(lambda: bool(live.engine.requests))
        assert live.engine.aborted == []
    wait_until(lambda: live.engine.aborted == [live.engine.requests[0].request_id], seconds=0.9)
    wait_until(lambda: 'cut_off_total{cause="disconnect"} 1.0' in live.client.get("/metrics").text)


def test_what_is_finished_is_not_aborted(live: Live) -> None:
    live.post("/v1/completions", prompt="x")
    events(live, "/v1/completions", prompt="x")
    assert live.engine.aborted == []


def test_not_ready(live: Live) -> None:
    assert live.client.get("/ready").status_code == 200
    live.engine.running = False
    assert live.client.get("/ready").status_code == 503
    assert live.client.get("/health").status_code == 200
    assert error_of(live.post("/v1/completions", prompt="x"), 503)["code"] == "engine_stopped"


def test_tokenize_and_back(live: Live, tokenizer: Tokenizer) -> None:
    for text in (STORY, "", END_OF_TEXT, STORY * 200):
        answer = live.post("/tokenize", prompt=text).json()
        assert answer == {"tokens": tokenizer.encode(text), "count": len(tokenizer.encode(text)), "max_model_len": 64}
        assert live.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    assert error_of(live.post("/detokenize", tokens=[280]), 400)["param"] == "tokens"


def test_models(live: Live) -> None:
    listed = live.client.get("/v1/models").json()
    assert listed == {"object": "list", "data": [live.client.get("/v1/models/tiny").json()]}
    mot = listed["data"][0]["mot"]
    assert (mot["group_fill"], mot["private_temperature"], mot["reference_fingerprint"]) == ("reference", 0.25, "abc")


def test_metrics_count_and_name_nothing_of_a_request(live: Live) -> None:
    live.post("/v1/completions", prompt=SECRET, max_tokens=3, user=SECRET, private=True)
    live.client.get(f"/{SECRET}")
    text = live.client.get("/metrics").text
    assert SECRET not in text and live.engine.requests[0].request_id not in text
    for line in (
        'motserve_http_requests_total{endpoint="/v1/completions",status="200"} 1.0',
        'motserve_http_requests_total{endpoint="other",status="404"} 1.0',
        "motserve_time_to_first_token_seconds_count 1.0",
        "motserve_inter_token_seconds_count 2.0",
        "motserve_completion_tokens_total 3.0",
        "motserve_sequences_running 2.0",
        "motserve_sequences_waiting 1.0",
        "motserve_kv_blocks_used 4.0",
        "motserve_public_groups_total 3.0",
        "motserve_ready 1.0",
    ):
        assert line in text, line
