"""Chat messages to one prompt: the checkpoint's own template, or a plain fallback.

A template comes with the checkpoint and runs in jinja's immutable sandbox. Knows text only: no tokens, no HTTP.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import CheckpointError
from server.engine.request import RequestError


class _Refused(TemplateError):
    """Raised by a template through ``raise_exception``."""


class ChatTemplate:
    """Renders messages. Without a template, contents are joined by blank lines and the model goes on from there:
    right for a model that only ever saw prose, and free of markers that it would not know."""

    def __init__(self, source: str | None = None, special_tokens: Mapping[str, str] | None = None) -> None:
        self._special_tokens = dict(special_tokens or {})
        self._template = _compile(source) if source is not None else None

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """From ``chat_template.jinja`` or ``tokenizer_config.json``; the fallback where neither has one. Raises
        CheckpointError on a broken one."""
        config = _read_config(folder / "tokenizer_config.json")
        path = folder / "chat_template.jinja"
        try:
            source = path.read_text(encoding="utf-8") if path.exists() else _default_template(config)
            return cls(source, _special_tokens(config))
        except (TemplateError, OSError, UnicodeDecodeError, TypeError, KeyError) as error:
            raise CheckpointError(f"{folder}: chat template: {type(error).__name__}: {error}") from None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt after which the assistant's answer begins. Raises RequestError where the template refuses."""
        if self._template is None:
            return "\n\n".join(message["content"] for message in messages)
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
            # Whatever a template trips over came with the messages; what it says may quote them.
            raise RequestError(
                "`messages`: the checkpoint's chat template does not accept this conversation.", param="messages"
            ) from None


def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now(datetime.UTC).strftime(pattern)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return config


def _default_template(config: Mapping[str, Any]) -> str | None:
    """``chat_template`` is one template, or a list of named ones of which ``default`` counts."""
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if found is not None and not isinstance(found, str):
        raise TypeError("chat_template is neither a string nor a list of named ones")
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and its kin: strings, or objects whose ``content`` is one."""
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens
