"""Byte-pair tokenizer around ``tokenizers``, and decoding one token at a time.

Knows text and token ids, nothing of models or requests.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from model.errors import CheckpointError

FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, inner: _Tokenizer) -> None:
        self._inner = inner
        self._written: dict[int, bytes] = {}  # by id, as they are met

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The folder's ``tokenizer.json``, or None where there is none. Raises CheckpointError on a broken one."""
        path = folder / FILE
        if not path.exists():
            return None
        try:
            return cls(_Tokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE, so that every text has tokens and every token bytes; ``<|endoftext|>`` is id 0."""
        inner = _Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[END_OF_TEXT],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        return cls(inner)

    def save(self, folder: Path) -> None:
        self._inner.save(str(folder / FILE))

    @property
    def vocab_size(self) -> int:
        size: int = self._inner.get_vocab_size(with_added_tokens=True)
        return size

    def id_of(self, token: str) -> int | None:
        found: int | None = self._inner.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self) -> TextStream:
        """For one sequence's ids."""
        return ByteStream(self) if isinstance(self._inner.decoder, decoders.ByteLevel) else WindowStream(self)

    def written_bytes(self, token_id: int) -> bytes:
        """What a byte-level tokenizer writes for a token, whatever stands before it: nothing for a special one."""
        written = self._written.get(token_id)
        if written is None:
            added = self._inner.get_added_tokens_decoder().get(token_id)
            written = b"" if added is not None and added.special else self.token_bytes(token_id)
            self._written[token_id] = written
        return written

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for: half a character is possible. Empty for an id the tokenizer lacks."""
        token = self._inner.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[char] for char in token)
        except KeyError:  # a special token, written as itself
            return str(token).encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (Radford et al. 2019, ``bytes_to_unicode``), the other way round."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class TextStream(Protocol):
    """Turns a stream of ids into a stream of text, never emitting part of a UTF-8 character."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; may be empty."""

    def flush(self) -> str:
        """What is left at the end, with a replacement character for bytes that never became a character."""


class ByteStream:
    """``TextStream`` of a byte-level tokenizer, which writes a token the same way after whatever others."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.written_bytes
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._characters.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._characters.decode(b"", final=True)


class WindowStream:
    """``TextStream`` of any tokenizer.

    A window of recent ids is decoded again at each step, since a tokenizer may write a token differently after
    another. Replacement characters at the end of the window may be part of a character still to come and are withheld;
    so is everything while the window no longer begins with what was emitted of it (a decoder that falls back to bytes
    gives up a whole run of them until its last character is complete). ``flush`` gives up on what is withheld.
    """

    _WINDOW = 24  # ids; a longer window is cut, so that a step costs the same however long the text is
    _CONTEXT = 12  # ids that stay then
    _UNFINISHED = 3  # bytes of a character, and so replacement characters, that can be there before its last byte

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = ""  # of the window's text

    def _certain(self, text: str) -> str:
        """The part of the window's text that no further id can change."""
        return text[: max(len(text.rstrip(_REPLACEMENT)), len(text) - self._UNFINISHED)]

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        certain, new = self._certain(text), ""
        # Between characters is the better place to cut, but not every stream of tokens comes to one.
        cut = len(self._ids) >= (self._WINDOW if certain == text else 2 * self._WINDOW)
        if cut or certain.startswith(self._emitted):
            new, self._emitted = certain[len(self._emitted) :], certain
        if cut:
            self._shorten()
        return new

    def _shorten(self) -> None:
        """Leaves the last ids, from one that begins a character where there is one."""
        start = len(self._ids) - self._CONTEXT
        for extra in range(self._UNFINISHED + 1):
            ids = self._ids[start + extra :]
            text = self._tokenizer.decode(ids)
            if not text.startswith(_REPLACEMENT):
                break
        self._ids, self._emitted = ids, self._certain(text)

    def flush(self) -> str:
        left = self._tokenizer.decode(self._ids)[len(self._emitted) :]
        self._ids, self._emitted = [], ""
        return left
