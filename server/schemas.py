"""What clients may ask, checked strictly: OpenAI's request bodies and our extra fields.

Unknown fields, wrong types and values out of range are refused with a message that names the field and never quotes
its value. Null means the default, as OpenAI's clients send it. What depends on the checkpoint (vocabulary, lengths,
temperature) is checked in ``preprocess``; this module knows none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.engine.request import RequestError

Prompt = str | tuple[int, ...]
Model = TypeVar("Model", bound=BaseModel)

MAX_PROMPTS = 2048
MAX_N = 128
_MAX_COUNT = 2**31 - 1
_LONGEST_NAME = 64  # of a field that is not ours, when an error names it


def _refuse(field: str, reason: str, code: str = "invalid_value") -> NoReturn:
    """From within a validator: names a field that pydantic would not."""
    raise PydanticCustomError("refused", "refused", {"field": _short(field), "reason": reason, "code": code})


def check_text(text: str) -> str:
    """Half a surrogate pair is valid JSON and no text. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("should be valid Unicode") from None
    return text


def parse_prompts(value: object) -> tuple[Prompt, ...]:
    """A string, strings, token ids, or lists of token ids; always returned as several. By hand, since a union's
    errors would name every branch and every item. Raises ValueError."""
    if isinstance(value, str):
        return (check_text(value),)
    if not isinstance(value, list) or not value:
        raise ValueError("should be a string, strings, token ids or lists of token ids, and not empty")
    if all(type(item) is int for item in value):
        return (tuple(value),)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"should hold at most {MAX_PROMPTS} prompts")
    prompts: list[Prompt] = []
    for item in value:
        if isinstance(item, str) and isinstance(value[0], str):
            prompts.append(check_text(item))
        elif isinstance(item, list) and isinstance(value[0], list) and item and all(type(i) is int for i in item):
            prompts.append(tuple(item))
        else:
            raise ValueError("should hold strings only, token ids only, or lists of token ids that are not empty only")
    return tuple(prompts)


def one_or_more(value: object) -> object:
    """A lone string stands for a list of one."""
    return [value] if isinstance(value, str) else value


def join_text_parts(value: object) -> object:
    """Content as text parts: their text, a line each. Raises ValueError on any other kind of part."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        known = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        if not known or not isinstance(part["text"], str):
            raise ValueError('should be a string or a list of {"type": "text", "text": string}; only text is supported')
        texts.append(part["text"])
    return "\n".join(texts)


def parse_token_bias(value: object) -> dict[int, float]:
    """Biases by token id. JSON's keys are strings: plain decimal ones only. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("should be an object from token ids to numbers")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key):
            raise ValueError("should have token ids, written as decimal strings, as its keys")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError("should have numbers from -100 to 100 as its values")
        biases[int(key)] = float(bias)
    return biases


NonEmpty = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=_MAX_COUNT)]


class StrictModel(BaseModel):
    """No coercion, no unknown fields, no silence.

    ``unsupported`` holds fields of OpenAI's that we lack, each with the values at which it asks for nothing.
    """

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                if value is not None:
                    kept[name] = value
            elif name not in cls.unsupported:
                _refuse(name, "is not a field of this request", "unknown_parameter")
            elif value is not None and not any(
                type(value) is type(no_op) and value == no_op for no_op in cls.unsupported[name]
            ):
                _refuse(name, "is not supported", "unsupported_parameter")
        return kept


class StreamOptions(StrictModel):
    unsupported = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False


class GenerationRequest(StrictModel):
    """What completions and chat completions share."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_N)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, le=_MAX_COUNT)
    min_tokens: int = Field(0, ge=0, le=_MAX_COUNT)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=_MAX_COUNT)  # 0 and -1: all
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    logit_bias: Annotated[dict[int, float], PlainValidator(parse_token_bias)] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[NonEmpty], BeforeValidator(one_or_more), Field(max_length=16)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] = Field(default_factory=list)
    ignore_eos: bool = False
    private: bool | None = None  # None: what the server's settings say
    private_temperature: float | None = Field(None, ge=0)
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None  # private prefixes: who shares them
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    return_token_ids: bool = False
    user: str | None = None  # OpenAI: a name for the end user; it changes nothing and is kept nowhere

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            _refuse("stream_options", "is only for requests with `stream` true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    unsupported = {"suffix": ()}

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(parse_prompts)]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=MAX_N)

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            _refuse("best_of", "is only supported where it equals `n`")
        return self


class ChatMessage(StrictModel):
    unsupported = {"tool_calls": ([],), "tool_call_id": (), "function_call": (), "refusal": (), "audio": ()}

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, AfterValidator(check_text), BeforeValidator(join_text_parts)]
    name: str | None = None


class ChatRequest(GenerationRequest):
    unsupported = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),  # without tools there are no calls to make in parallel
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_COUNT)
    max_tokens: int | None = Field(None, ge=1, le=_MAX_COUNT)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            _refuse("top_logprobs", "is only for requests with `logprobs` true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            _refuse("max_tokens", "contradicts `max_completion_tokens`; give one of them")
        return self


class TokenizeRequest(StrictModel):
    model: str | None = None
    prompt: str


class DetokenizeRequest(StrictModel):
    model: str | None = None
    tokens: list[TokenId]


def parse_body(model: type[Model], body: bytes) -> Model:
    """The request that a body holds. Raises RequestError with status 400, whatever is wrong."""
    try:
        data = json.loads(body, parse_constant=_not_a_number)
    except (ValueError, RecursionError):
        raise RequestError("The request body is not valid JSON.", param=None, code="invalid_json") from None
    if not isinstance(data, dict):
        raise RequestError("The request body should be a JSON object.", param=None, code="invalid_json")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[0]
        raise _request_error(dict(details)) from None


def _not_a_number(_: str) -> NoReturn:
    """JSON has no NaN and no Infinity, though Python's parser takes them."""
    raise ValueError("not JSON")


def _request_error(details: dict[str, Any]) -> RequestError:
    """A finding of pydantic's, told to the client: ``param`` is the request's field, the message names the spot."""
    where: list[str | int] = list(details["loc"])
    reason, code = str(details["msg"]), "invalid_value"
    if details["type"] == "refused":
        context = details["ctx"]
        where, reason, code = [*where, context["field"]], context["reason"], context["code"]
    elif details["type"] == "missing":
        reason, code = "is required", "missing_required_parameter"
    elif details["type"].endswith("_type"):
        code = "invalid_type"
    reason = reason.removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)[1:]
    return RequestError(f"`{path}`: {reason}.", param=str(where[0]) if where else None, code=code)


def _short(name: str) -> str:
    """A field's name as an error may repeat it: printable and no longer than a name is."""
    clean = "".join(char if char.isprintable() else "?" for char in name[:_LONGEST_NAME])
    return clean + ("..." if len(name) > _LONGEST_NAME else "")
