"""Every call the API has, as data: what is sent and how the answer is read. The clients only carry them out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from clients import types
from clients.errors import ProtocolError

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """``body`` None: a GET."""

    path: str
    answer: TypeAdapter[T]
    body: Mapping[str, Any] | None = None

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"

    def read(self, content: bytes) -> T:
        """The answer that a body holds. Raises ProtocolError."""
        try:
            data = json.loads(content)
        except ValueError:
            raise ProtocolError(f"The server's answer from {self.path} is not JSON.") from None
        return types.read(self.answer, data)


# Built once: that costs far more than reading an answer.
_COMPLETION = TypeAdapter(types.Completion)
_CHAT = TypeAdapter(types.ChatCompletion)
_CHAT_CHUNK = TypeAdapter(types.ChatChunk)
_TOKENS = TypeAdapter(types.Tokens)
_TEXT = TypeAdapter(types.Text)

MODELS = Call("/v1/models", TypeAdapter(types.ModelList))


def completion(prompt: types.Prompt, fields: types.CompletionFields) -> Call[types.Completion]:
    return Call("/v1/completions", _COMPLETION, {**_plain(fields), "prompt": prompt})


def completion_stream(prompt: types.Prompt, fields: types.CompletionFields) -> Call[types.Completion]:
    return Call("/v1/completions", _COMPLETION, {**_plain(fields), "prompt": prompt, "stream": True})


def chat(messages: Sequence[types.Message], fields: types.ChatFields) -> Call[types.ChatCompletion]:
    return Call("/v1/chat/completions", _CHAT, {**_plain(fields), "messages": list(messages)})


def chat_stream(messages: Sequence[types.Message], fields: types.ChatFields) -> Call[types.ChatChunk]:
    return Call("/v1/chat/completions", _CHAT_CHUNK, {**_plain(fields), "messages": list(messages), "stream": True})


def tokenize(text: str) -> Call[types.Tokens]:
    return Call("/tokenize", _TOKENS, {"prompt": text})


def detokenize(tokens: Sequence[int]) -> Call[types.Text]:
    return Call("/detokenize", _TEXT, {"tokens": list(tokens)})


def _plain(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Untyped callers know ``stream`` from other clients; here the method's name decides, so the kind returned is
    always the one declared."""
    if "stream" in fields:
        raise TypeError("`stream` is not a field here: call stream_completions or stream_chat")
    return fields
