"""Server-sent events from bytes, however the network has cut them. Pure: knows no sockets, so both clients share it."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clients.errors import ProtocolError, error_from_event

# Not str.splitlines, which also splits at U+2028 and its like: JSON may hold those as they are.
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Event:
    data: str
    name: str = "message"


class EventDecoder:
    """The event-stream format of the HTML standard. An event that its blank line never ended is dropped, as there."""

    def __init__(self) -> None:
        self._text = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._partial = ""  # a line whose end has not come
        self._after_return = False  # a line feed that comes next belongs to the line before
        self._data: list[str] = []
        self._name = ""

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that end within ``chunk``."""
        events = []
        for line in self._lines(self._text.decode(chunk)):
            if line:
                self._take(line)
                continue
            if self._data:
                events.append(Event("\n".join(self._data), self._name or "message"))
            self._data, self._name = [], ""
        return events

    def _lines(self, text: str) -> list[str]:
        """Whole lines. A carriage return at the very end counts at once, so that no event waits for the next chunk."""
        if not text:
            return []
        if self._after_return:
            text = text.removeprefix("\n")
        self._after_return = text.endswith("\r")
        *lines, self._partial = _LINE_END.split(self._partial + text)
        return lines

    def _take(self, line: str) -> None:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value


class ChunkDecoder:
    """The JSON objects of an OpenAI stream, up to its ``[DONE]``."""

    def __init__(self) -> None:
        self._events = EventDecoder()
        self._done = False

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """The objects that end within ``chunk``; to be exhausted before the next one. Those before an error come
        first, then it is raised: APIError if the server reports one, ProtocolError if it is no such stream."""
        for event in self._events.feed(chunk):
            if self._done:
                return
            if event.data == "[DONE]":
                self._done = True
                return
            yield _parse(event)

    def finish(self) -> None:
        """To be called when the bytes end. Raises ProtocolError if the stream did not: what came may be a part."""
        if not self._done:
            raise ProtocolError("The stream ended before its [DONE]: the answer may be incomplete.")


def _parse(event: Event) -> dict[str, Any]:
    try:
        data = json.loads(event.data)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise ProtocolError("The stream holds an event that is not a JSON object.")
    if "error" in data or event.name == "error":
        raise error_from_event(data.get("error", data))
    return data
