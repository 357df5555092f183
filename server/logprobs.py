"""Log probabilities as OpenAI's two endpoints write them.

Knows tokens and their bytes; nothing of requests, streams or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from model.tokenizer import Tokenizer
from server.engine.request import TokenLogprob

Json = dict[str, Any]

_LEAST = -9999.0  # stands for minus infinity, which JSON lacks


@dataclass(frozen=True)
class TokenText:
    """How one token is shown. ``special``: it leaves no text in an answer."""

    text: str
    raw: bytes
    special: bool


class Vocabulary:
    """Token ids to what clients see, each worked out once. Without a tokenizer, ``token_id:N``."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, TokenText] = {}  # no larger than the vocabulary

    def __getitem__(self, token_id: int) -> TokenText:
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._look_up(token_id)
        return found

    def _look_up(self, token_id: int) -> TokenText:
        if self._tokenizer is None:
            return TokenText(_by_id(token_id), b"", special=True)
        raw = self._tokenizer.token_bytes(token_id)
        if not raw:  # an embedding row beyond the tokenizer's vocabulary
            return TokenText(_by_id(token_id), b"", special=True)
        return TokenText(raw.decode(errors="replace"), raw, special=not self._tokenizer.decode([token_id]))


def _by_id(token_id: int) -> str:
    return f"token_id:{token_id}"


class TextOffsets:
    """Where each token begins in the text, in characters. A token may begin inside a character: it is given that
    character's place."""

    def __init__(self, start: int = 0) -> None:
        self._start = self._characters = start

    def place(self, token: TokenText, *, show_special: bool = False) -> int:
        """The place of the next token."""
        if token.special and not show_special:
            return self._characters
        inside = bool(token.raw) and token.raw[0] & 0xC0 == 0x80  # UTF-8 continuation
        place = max(self._start, self._characters - inside)
        self._characters += sum(byte & 0xC0 != 0x80 for byte in token.raw)
        return place


def completion_logprobs(
    vocabulary: Vocabulary, entries: Sequence[TokenLogprob], offsets: TextOffsets, *, show_special: bool = False
) -> Json:
    """The ``logprobs`` of a completion choice."""
    tokens = [vocabulary[entry.token_id] for entry in entries]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [_alternatives(vocabulary, entry) for entry in entries],
        "text_offset": [offsets.place(token, show_special=show_special) for token in tokens],
    }


def prompt_logprobs(
    vocabulary: Vocabulary, prompt: Sequence[int], entries: Sequence[TokenLogprob | None], text: str
) -> Json:
    """The same for an echoed prompt. Its first token follows nothing: there the probabilities are null."""
    offsets = TextOffsets()
    tokens = [vocabulary[token_id] for token_id in prompt]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else _alternatives(vocabulary, entry) for entry in entries],
        "text_offset": [min(offsets.place(token, show_special=True), len(text)) for token in tokens],
    }


def chat_logprobs(vocabulary: Vocabulary, entries: Iterable[TokenLogprob]) -> Json:
    """The ``logprobs`` of a chat choice."""
    content = []
    for entry in entries:
        shown = _chat_token(vocabulary, entry.token_id, entry.logprob)
        shown["top_logprobs"] = [_chat_token(vocabulary, token_id, logprob) for token_id, logprob in entry.top]
        content.append(shown)
    return {"content": content, "refusal": None}


def _chat_token(vocabulary: Vocabulary, token_id: int, logprob: float) -> Json:
    token = vocabulary[token_id]
    return {"token": token.text, "logprob": _finite(logprob), "bytes": list(token.raw)}


def _alternatives(vocabulary: Vocabulary, entry: TokenLogprob) -> dict[str, float]:
    """Best first, the chosen token always among them and under its own text; two tokens of one text (halves of
    characters all look alike) are told apart by their ids."""
    chosen = vocabulary[entry.token_id].text
    shown: dict[str, float] = {}
    for token_id, logprob in entry.top:
        text = vocabulary[token_id].text
        if token_id != entry.token_id and (text == chosen or text in shown):
            text = _by_id(token_id)
        shown[text] = _finite(logprob)
    shown.setdefault(chosen, _finite(entry.logprob))
    return shown


def _finite(logprob: float) -> float:
    """NaN stays and fails when it is encoded: it would be a fault of ours."""
    return _LEAST if logprob < _LEAST else logprob
