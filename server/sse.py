"""Server-sent events: bytes only.

Pure functions, cheap enough to run once a token for hundreds of streams. Knows nothing of tokens, choices or sockets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
