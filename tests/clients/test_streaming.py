"""Event decoding: the same events whatever the chunks, and no answer that only looks whole."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients import APIError, ProtocolError
from clients._streaming import ChunkDecoder, Event, EventDecoder

LINE_ENDS = st.sampled_from(["\n", "\r", "\r\n"])
# Any text but the two signs that end lines; U+2028, U+0085 and characters of four bytes are in it.
LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def events_of(chunks: Iterable[bytes]) -> list[Event]:
    decoder = EventDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[Event]]:
    """A stream with the events that it must give: several data lines, names, comments, ids, all three line ends."""
    text, expected = draw(st.sampled_from(["", "\ufeff"])), []
    for lines, name, comment in draw(
        st.lists(st.tuples(st.lists(LINE, min_size=1, max_size=3), st.sampled_from(["", "error"]), LINE), max_size=5)
    ):
        end = draw(LINE_ENDS)
        parts = [f": {comment}", "id: 7", f"event: {name}", *(f"data: {line}" for line in lines), "", ""]
        text += end.join(parts[:-1]) + end
        expected.append(Event("\n".join(lines), name or "message"))
    return text.encode(), expected


@given(streams(), st.lists(st.integers(0, 10_000)))
def test_chunk_boundaries_do_not_matter(stream: tuple[bytes, list[Event]], places: list[int]) -> None:
    data, expected = stream
    assert events_of(cut(data, places)) == expected
    assert events_of(bytes([byte]) for byte in data) == expected


@given(st.lists(st.binary(max_size=50)))
def test_any_bytes_decode_alike_in_any_chunks(chunks: list[bytes]) -> None:
    assert events_of(chunks) == events_of([b"".join(chunks)])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"data:x\n\n", [Event("x")]),
        (b"data:  x\n\n", [Event(" x")]),
        (b"data\n\n", [Event("")]),
        (b"data: x\ndata: y\n\n", [Event("x\ny")]),
        (b"event: error\n\ndata: x\n\n", [Event("x")]),
        (b"data: unfinished\n", []),
        (b": comment\n\n\n\n", []),
        (b"data: \xff\n\n", [Event("\ufffd")]),
    ],
)
def test_the_format(data: bytes, expected: list[Event]) -> None:
    assert events_of([data]) == expected


def test_an_event_does_not_wait_for_the_line_feed_after_its_carriage_return() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"data: x\r\n\r") == [Event("x")]
    assert decoder.feed(b"\ndata: y\r\n\r\n") == [Event("y")]


JSON_OBJECTS = st.lists(st.dictionaries(st.text(max_size=5).filter(lambda key: key != "error"), st.text(max_size=20)))


@given(JSON_OBJECTS, st.lists(st.integers(0, 10_000)))
def test_objects_come_through_until_done(objects: list[dict[str, str]], places: list[int]) -> None:
    text = "".join(f"data: {json.dumps(item, ensure_ascii=False)}\n\n" for item in objects)
    data = (text + "data: [DONE]\n\ndata: not read\n\n").encode()
    decoder = ChunkDecoder()
    assert [item for chunk in cut(data, places) for item in decoder.feed(chunk)] == objects
    decoder.finish()


def test_a_stream_without_done_is_an_error() -> None:
    decoder = ChunkDecoder()
    assert list(decoder.feed(b'data: {"a": 1}\n\n')) == [{"a": 1}]
    with pytest.raises(ProtocolError, match="before its \\[DONE\\]"):
        decoder.finish()


@pytest.mark.parametrize(
    "event", ['data: {"error": {"message": "broken", "code": "c"}}', 'event: error\ndata: {"message": "broken"}']
)
def test_a_reported_error_comes_after_what_was_before_it(event: str) -> None:
    items = ChunkDecoder().feed(f'data: {{"a": 1}}\n\n{event}\n\n'.encode())
    assert next(items) == {"a": 1}
    with pytest.raises(APIError, match="broken") as caught:
        next(items)
    assert caught.value.status is None


@pytest.mark.parametrize("data", [b"data: {\n\n", b"data: 3\n\n", b"data: \n\n"])
def test_what_is_no_json_object_is_an_error(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a JSON object"):
        list(ChunkDecoder().feed(data))
