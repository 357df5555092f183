"""A sequence's ids to text that is safe to send: whole characters only, and never part of a stop string.

Knows one sequence's ids and its stop strings, nothing of engines.
"""

from __future__ import annotations

from model.tokenizer import Tokenizer


class Detokenizer:
    """Feed ids, receive text. Once a stop string has appeared, ``stopped`` names it and nothing more comes."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._decoder = tokenizer.stream()
        self._stop = stop
        self._held = ""  # text that may yet turn out to begin a stop string
        self.stopped: str | None = None

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """New text. Without ``may_stop`` (``min_tokens`` not reached) stop strings are text like any other."""
        text = self._decoder.push(token_id)
        return self._release(text) if may_stop else text

    def finish(self) -> str:
        """What was held back, when the sequence ends for another reason than a stop string."""
        if self.stopped is not None:
            return ""
        text = self._release(self._decoder.flush())
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped is not None or not text:
            return ""
        if not self._stop:
            return text
        self._held += text
        found = [(place, stop) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            place, self.stopped = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            text, self._held = self._held[:place], ""
            return text
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` and is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
