"""What the server answers, as frozen dataclasses, and what may be asked, as typed dictionaries.

Answers are read leniently: a member that is not named here is passed over, so that a newer server can say more. One
that is missing or of the wrong kind is a ProtocolError that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

from pydantic import TypeAdapter, ValidationError

from clients.errors import ProtocolError

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Message = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Mot:
    """The receipt: what a request's tokens mixed with, as means over them."""

    private: bool
    temperature: float
    live_members: float  # counts the request itself: 1 when private
    reference_members: float
    mixing_entropy: float
    group_fill: str | None = None


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class CompletionLogprobs:
    """One item a token in every member. With ``echo`` the prompt's first token has None."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...] | None = None
    text_offset: tuple[int, ...] = ()


@dataclass(frozen=True)
class CompletionChoice:
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer, or one chunk of a stream."""

    id: str
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage | None = None
    mot: Mot | None = None  # of a stream: in its last chunk

    @property
    def text(self) -> str:
        """The first choice's text; empty in chunks without a choice, such as the one with the usage."""
        return self.choices[0].text if self.choices else ""


@dataclass(frozen=True)
class TopLogprob:
    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TokenLogprob:
    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None
    top_logprobs: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class ChatLogprobs:
    content: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class ChatMessage:
    """A whole message, or in a stream what is new of it."""

    role: str | None = None
    content: str | None = None


@dataclass(frozen=True)
class ChatChoice:
    index: int
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


@dataclass(frozen=True)
class ChatCompletion:
    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage | None = None
    mot: Mot | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return (self.choices[0].message.content if self.choices else None) or ""


@dataclass(frozen=True)
class ChatChunkChoice:
    index: int
    delta: ChatMessage
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


@dataclass(frozen=True)
class ChatChunk:
    id: str
    created: int
    model: str
    choices: tuple[ChatChunkChoice, ...]
    usage: Usage | None = None
    mot: Mot | None = None

    @property
    def text(self) -> str:
        """What is new of the first choice's text; empty in chunks without any."""
        return (self.choices[0].delta.content if self.choices else None) or ""


@dataclass(frozen=True)
class Model:
    id: str
    owned_by: str | None = None
    created: int | None = None


@dataclass(frozen=True)
class ModelList:
    data: tuple[Model, ...]


@dataclass(frozen=True)
class Tokens:
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    prompt: str


class StreamOptions(TypedDict, total=False):
    include_usage: bool


class GenerationFields(TypedDict, total=False):
    """What completions and chat share; the server documents and checks each field."""

    model: str
    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[str, float]
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    private: bool
    private_temperature: float | None
    cache_salt: str
    priority: int
    user: str
    stream_options: StreamOptions


class CompletionFields(GenerationFields, total=False):
    echo: bool
    logprobs: int | None


class ChatFields(GenerationFields, total=False):
    max_completion_tokens: int | None
    logprobs: bool
    top_logprobs: int | None


def read(kind: TypeAdapter[T], data: object) -> T:
    """An answer of that kind. Raises ProtocolError naming the member at fault."""
    try:
        return kind.validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ProtocolError(f"The server's answer is not what the API promises: {where}: {first['msg']}.") from None
