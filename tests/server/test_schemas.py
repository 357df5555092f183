"""Request bodies: what is taken, and that every refusal is a 400 that names the field and quotes nothing."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.request import RequestError
from server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, GenerationRequest, parse_body

# field: (lowest, highest, are the ends allowed, is it an integer)
RANGES: dict[str, tuple[float, float, bool, bool]] = {
    "n": (1, 128, True, True),
    "max_tokens": (0, 2**31 - 1, True, True),
    "min_tokens": (0, 2**31 - 1, True, True),
    "temperature": (0, 2, True, False),
    "top_p": (0, 1, False, False),
    "top_k": (-1, 2**31 - 1, True, True),
    "min_p": (0, 1, True, False),
    "presence_penalty": (-2, 2, True, False),
    "frequency_penalty": (-2, 2, True, False),
    "repetition_penalty": (0, 2, False, False),
    "seed": (-(2**63), 2**63 - 1, True, True),
    "logprobs": (0, 20, True, True),
    "priority": (-(2**31), 2**31 - 1, True, True),
}
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = [{"role": "user", "content": "hello"}]


def completion(**fields: Any) -> CompletionRequest:
    return parse_body(CompletionRequest, json.dumps({"prompt": "a", **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    return parse_body(ChatRequest, json.dumps({"messages": MESSAGES, **fields}).encode())


def refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    assert caught.value.status == 400
    return caught.value


@given(st.sampled_from(sorted(RANGES)), NUMBERS)
def test_numbers_are_taken_exactly_within_their_range(field: str, value: float) -> None:
    low, high, closed, integer = RANGES[field]
    inside = low <= value <= high if closed else low < value <= high
    if inside and not (integer and isinstance(value, float)):
        assert getattr(completion(**{field: value}), field) == value
    else:
        assert refusal(**{field: value}).param == field


@pytest.mark.parametrize("field", sorted(RANGES))
def test_ends_of_ranges(field: str) -> None:
    low, high, closed, _ = RANGES[field]
    assert getattr(completion(**{field: high}), field) == high
    if closed:
        assert getattr(completion(**{field: low}), field) == low
    else:
        assert refusal(**{field: low}).param == field


@pytest.mark.parametrize("field", sorted(RANGES))
@pytest.mark.parametrize("value", [True, "1", [1], {}, math.nan, math.inf, -math.inf])
def test_nothing_stands_in_for_a_number(field: str, value: object) -> None:
    error = refusal(**{field: value})
    invalid_json = isinstance(value, float)  # NaN and infinity are no JSON at all
    assert error.param == (None if invalid_json else field)


def test_a_number_too_large_for_a_float() -> None:
    with pytest.raises(RequestError) as caught:
        parse_body(CompletionRequest, b'{"prompt": "a", "temperature": 1e999}')
    assert caught.value.param == "temperature"


@pytest.mark.parametrize("field", sorted(set(CompletionRequest.model_fields) - {"prompt"}))
def test_null_is_the_default(field: str) -> None:
    assert completion(**{field: None}) == completion()


@pytest.mark.parametrize("field", ["stream", "echo", "ignore_eos", "private", "return_token_ids"])
@pytest.mark.parametrize("value", [0, 1, "true", []])
def test_nothing_stands_in_for_a_boolean(field: str, value: object) -> None:
    assert refusal(**{field: value}).param == field


@given(JSON)
def test_prompts_of_any_shape_are_taken_or_named(value: Any) -> None:
    body = json.dumps({"prompt": value}).encode()
    try:
        prompts = parse_body(CompletionRequest, body).prompt
    except RequestError as error:
        assert (error.status, error.param) == (400, "prompt")
    else:
        assert prompts and all(isinstance(prompt, str | tuple) for prompt in prompts)


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_prompts_as_token_ids(ids: list[int]) -> None:
    assert completion(prompt=ids).prompt == (tuple(ids),)
    assert completion(prompt=[ids, ids]).prompt == (tuple(ids), tuple(ids))


@pytest.mark.parametrize(
    "prompt", [[], [[]], [[1], []], ["a", 1], [1, "a"], [[1], "a"], [True], [1.0], 1, {}, "\ud800"]
)
def test_bad_prompts(prompt: object) -> None:
    assert refusal(prompt=prompt).param == "prompt"


@given(st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100) | st.integers(-100, 100)))
def test_logit_bias(biases: dict[int, float]) -> None:
    assert completion(logit_bias={str(token): bias for token, bias in biases.items()}).logit_bias == biases


@given(st.text().filter(lambda key: not (key.isdecimal() and key.isascii())))
def test_logit_bias_takes_token_ids_only(key: str) -> None:
    assert refusal(logit_bias={key: 1}).param == "logit_bias"


@pytest.mark.parametrize("bias", [{"1": 100.5}, {"1": -101}, {"1": True}, {"1": "1"}, {"01": 1}, {"-1": 1}, [], "1"])
def test_bad_logit_bias(bias: object) -> None:
    assert refusal(logit_bias=bias).param == "logit_bias"


def test_stop() -> None:
    assert completion(stop="x").stop == ["x"]
    assert completion(stop=["x"] * 16).stop == ["x"] * 16
    bad: object
    for bad in ("", [""], ["x"] * 17, [1], 1, {}):
        assert refusal(stop=bad).param == "stop"


@given(st.text(min_size=1).filter(lambda name: name not in CompletionRequest.model_fields))
def test_unknown_fields_are_named_even_when_null(name: str) -> None:
    for value in (None, 1):
        error = refusal(**{name: value})
        assert error.param is not None
        assert name.isprintable() <= error.param.startswith(name[:64])
        assert len(error.param) < 80


@pytest.mark.parametrize("field", ["suffix"])
def test_unsupported_in_completions(field: str) -> None:
    assert refusal(**{field: "secret-text"}).param == field
    assert "secret-text" not in str(refusal(**{field: "secret-text"}))
    assert completion(**{field: None}) == completion()


@pytest.mark.parametrize(("field", "no_op"), [(k, v) for k, values in ChatRequest.unsupported.items() for v in values])
def test_openais_fields_that_ask_for_nothing(field: str, no_op: object) -> None:
    assert chat(**{field: no_op}) == chat()


@pytest.mark.parametrize("field", sorted(ChatRequest.unsupported))
@pytest.mark.parametrize("value", [1, ["x"], {"type": "json_object"}, "high"])
def test_openais_fields_that_ask_for_something(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**{field: value})
    assert (caught.value.status, caught.value.param) == (400, field)
    assert chat(**{field: None}) == chat()


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 2},
        {"n": 2, "best_of": 1},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": 1}},
        {"stream": True, "stream_options": {"surprise": 1}},
    ],
)
def test_fields_that_contradict(fields: dict[str, object]) -> None:
    assert refusal(**fields).param in ("best_of", "stream_options")
    assert completion(n=2, best_of=2).n == 2


@pytest.mark.parametrize(
    "fields",
    [{"top_logprobs": 1}, {"logprobs": 1}, {"logprobs": True, "top_logprobs": 21}, {"max_tokens": 0}, {"echo": True}],
)
def test_bad_chat_fields(fields: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param in fields


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        ["hello"],
        [{"role": "user"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "x", "surprise": 1}],
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_bad_messages(messages: object) -> None:
    with pytest.raises(RequestError) as caught:
        chat(messages=messages)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_content_parts_are_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "a\nb"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"prompt":' + b"9" * 5000 + b"}"])
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_body(CompletionRequest, body)
    assert caught.value.status == 400


@given(st.dictionaries(st.sampled_from(sorted(GenerationRequest.model_fields)), JSON, max_size=3))
def test_no_body_breaks_the_parser_or_is_quoted(fields: dict[str, Any]) -> None:
    secret = "do-not-repeat-me"
    for schema, needed in ((CompletionRequest, {"prompt": secret}), (ChatRequest, {"messages": secret})):
        try:
            parse_body(schema, json.dumps({**needed, **fields}).encode())
        except RequestError as error:
            assert error.status == 400
            assert error.param in {*fields, *needed}
            assert secret not in str(error)


def test_detokenize_takes_ids() -> None:
    assert parse_body(DetokenizeRequest, b'{"tokens": [1, 2]}').tokens == [1, 2]
    for bad in (b"{}", b'{"tokens": [-1]}', b'{"tokens": ["1"]}', b'{"tokens": [true]}'):
        with pytest.raises(RequestError) as caught:
            parse_body(DetokenizeRequest, bad)
        assert caught.value.param == "tokens"
