"""Text to ids and back, whole and one id at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models

from model.errors import CheckpointError
from model.tokenizer import END_OF_TEXT, ByteStream, TextStream, Tokenizer, WindowStream

TEXT = "The old sea and the old ship. Naïve café, 中国中国 and 日本; 🙂🙂 👩‍👩‍👧 and so on, and the end.\n" * 20
REPLACEMENT = "\ufffd"

texts = st.text(max_size=60).filter(lambda text: END_OF_TEXT not in text)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter([TEXT]), 400)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """By the tokenizer's own way and by a window of ids, which does for any."""
    streams: list[TextStream] = [tokenizer.stream(), WindowStream(tokenizer)]
    found, others = ([*map(stream.push, ids), stream.flush()] for stream in streams)
    assert "".join(found) == "".join(others)
    assert found == others or any(REPLACEMENT in piece for piece in found)
    return found


def test_training_merges_bytes(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer.stream(), ByteStream)
    assert 257 < tokenizer.vocab_size <= 400
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 2
    assert tokenizer.id_of(END_OF_TEXT) == 0
    assert tokenizer.id_of("no such token") is None


@given(text=texts)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.encode_batch([text, ""]) == [ids, []]


def test_bytes_of_unusual_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(0) == END_OF_TEXT.encode()
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


def test_special_tokens_are_skipped(tokenizer: Tokenizer) -> None:
    ids = [0, *tokenizer.encode("the end"), 0]
    assert tokenizer.decode(ids) == "the end"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{END_OF_TEXT}the end{END_OF_TEXT}"
    assert "".join(pieces(tokenizer, ids)) == "the end"


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded is not None and loaded.encode(TEXT) == tokenizer.encode(TEXT)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@given(text=texts)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    found = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(found) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in found)
        assert found[-1] == "", "nothing is withheld at the end of a valid text"


@given(ids=st.lists(st.integers(0, 399), max_size=80))
def test_pieces_of_any_ids_join_to_their_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Also where the bytes are no text at all."""
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=texts, data=st.data())
def test_any_way_to_cut_the_bytes_into_tokens(text: str, data: st.DataObject) -> None:
    """Tokens may begin and end inside characters, many in a row."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw))))) if raw else []
    parts = [raw[i:j] for i, j in zip([0, *cuts], [*cuts, len(raw)], strict=True) if i < j]
    tokenizer, ids = of_parts(parts)
    found = pieces(tokenizer, ids)
    assert "".join(found) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in found)


def of_parts(parts: list[bytes]) -> tuple[Tokenizer, list[int]]:
    """A byte-level tokenizer with these tokens, and their ids."""
    letters = {bytes([byte]): letter for byte in range(256) for letter in [letter_of(byte)]}
    names = ["".join(letters[part[i : i + 1]] for i in range(len(part))) for part in parts]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    inner = Inner(models.BPE(vocabulary, []))
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner), [vocabulary[name] for name in names]


def letter_of(byte: int) -> str:
    """GPT-2's letter for a byte, written apart from the tokenizer's own table."""
    if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
        return chr(byte)
    return chr(256 + [*range(33), *range(127, 161), 173].index(byte))


def test_tokens_that_cross_characters_for_long() -> None:
    first, *rest = "中".encode()
    tokenizer, ids = of_parts([bytes([first])] + [bytes([*rest, first])] * 40 + [bytes(rest)])
    found = pieces(tokenizer, ids)
    assert found == ["", *["中"] * 41, ""]


def test_the_window_stays_short(tokenizer: Tokenizer) -> None:
    """A step costs the same however long the text and even where no byte ever becomes a character."""

    class Counting(Tokenizer):
        longest = 0

        def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
            window = list(ids)
            self.longest = max(self.longest, len(window))
            return tokenizer.decode(window)

    (half,) = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xe4"]
    for ids in (tokenizer.encode(TEXT), [half] * 300):
        counting = Counting(tokenizer._inner)
        assert "".join(pieces(counting, ids)) == tokenizer.decode(ids)
        assert counting.longest <= 48


def test_byte_fallback() -> None:
    """A decoder that gives up a whole run of bytes until its last character is complete."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "b": 257}
    inner = Inner(models.BPE(vocabulary, [], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(inner)
    assert isinstance(tokenizer.stream(), WindowStream)
    ids = [256, *"中🙂".encode(), 257, 256, *"éé".encode(), 256]
    assert tokenizer.decode(ids) == " a中🙂b aéé a"
    for stream in (ids, [256, *("中国🙂é" * 50).encode(), 256]):
        found = pieces(tokenizer, stream)
        assert "".join(found) == tokenizer.decode(stream)
        assert not any(REPLACEMENT in piece for piece in found)
