"""Server-sent events: bytes only.

Pure functions, cheap enough to run once a token for hundreds of streams. Knows nothing of tokens, choices or sockets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# ASCII only: some clients split lines at every Unicode line separator, and JSON leaves U+2028 and U+0085 as they are.
# NaN is not JSON, so it fails here and not in the client.
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any]) -> bytes:
    """One event holding one JSON object."""
    return b"data: %b\n\n" % _encode(data).encode("ascii")


class EventEncoder:
    """Events of one stream, which all begin with the same members: those are encoded once."""

    def __init__(self, head: Mapping[str, Any]) -> None:
        self._head = b"data: " + (_encode(head)[:-1] + ",").encode("ascii")

    def event(self, rest: Mapping[str, Any]) -> bytes:
        """The head's members, then those of ``rest``. Neither may be empty."""
        return b"%b%b\n\n" % (self._head, _encode(rest)[1:].encode("ascii"))


class EventTemplate:
    """Events that are alike but for one string and, after it, at most one list of whole numbers: the rest is encoded
    once, by giving them as ``TEXT`` and ``NUMBERS``."""

    TEXT = "\0text"
    NUMBERS = "\0numbers"

    def __init__(self, encoded: bytes) -> None:
        # From the right: an event's head comes first, and may hold anything.
        self._before, _, after = encoded.rpartition(_encode(self.TEXT).encode("ascii"))
        self._between, self._numbers, self._after = after.partition(_encode(self.NUMBERS).encode("ascii"))

    def event(self, text: str, numbers: Sequence[int]) -> bytes:
        """The event with these in their places."""
        encoded = _encode(text).encode("ascii")
        if not self._numbers:
            return b"%b%b%b" % (self._before, encoded, self._between)
        listed = ",".join(map(str, numbers)).encode("ascii")
        return b"%b%b%b[%b]%b" % (self._before, encoded, self._between, listed, self._after)
