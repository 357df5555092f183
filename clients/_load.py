"""Load: what is sent and when. Pure: knows no sockets and no answers; the same seed gives the same bodies at the same
times."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LENGTHS = re.compile(r"([0-9]{1,7})(?::([0-9]{1,7}))?")


@dataclass(frozen=True)
class Lengths:
    """So many tokens: anything from ``low`` to ``high``, both included, each as likely as the other."""

    low: int
    high: int

    @classmethod
    def parse(cls, name: str, text: str) -> Lengths:
        """``64`` or ``16:200``. Raises ValueError that begins with ``name``, the flag the text came from."""
        found = _LENGTHS.fullmatch(text)
        low = int(found[1]) if found else 0
        high = int(found[2] or found[1]) if found else 0
        if not 1 <= low <= high:
            raise ValueError(f"{name}: {text!r} is neither a number of tokens, such as 64, nor a range, such as 16:200")
        return cls(low, high)

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class Load:
    """One setting: ``requests`` of which ``concurrency`` are always under way (closed loop), or which arrive at random,
    ``rate`` a second (open loop); the other one is None. ``private_share`` None: requests do not say whether they are
    private, and the server decides. ``warmup`` more come before them and are not measured."""

    requests: int
    concurrency: int | None
    rate: float | None = None
    private_share: float | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        assert (self.concurrency is None) != (self.rate is None), "either a closed or an open loop"

    def private(self, number: int) -> bool | None:
        """What the ``number``-th request says. Private ones are spread evenly, their share exact but for rounding."""
        if self.private_share is None:
            return None
        before, after = (math.floor(count * self.private_share + 0.5) for count in (number, number + 1))
        return after > before


@dataclass(frozen=True)
class Planned:
    """A request to come: its encoded ``body``, and when it is ``due``, in seconds after the start (closed loop: 0)."""

    body: bytes
    due: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """What every setting sends: prompts of ``texts``, or else of random token ids below ``vocabulary``, the first
    ``shared_prefix`` of which are the same in all of them. ``model`` and ``vocabulary`` None: not known yet."""

    prompt_tokens: Lengths
    output_tokens: Lengths
    model: str | None = None
    vocabulary: int | None = None
    shared_prefix: int = 0
    texts: Sequence[str] = ()
    temperature: float | None = None  # None: not sent
    ignore_eos: bool = True
    token_ids: bool = False
    cache_salt: str | None = None
    seed: int = 0

    def plan(self, load: Load) -> tuple[list[Planned], list[Planned]]:
        """The requests that warm up, and those that are measured. No two settings have prompts in common, so that a
        prefix cache holds only what ``shared_prefix`` says."""
        rng = random.Random(f"{self.seed}:{load}")
        prefix = self._random_tokens(random.Random(f"{self.seed}:prefix"), self.shared_prefix)
        bodies = [self._body(rng, prefix, load.private(number)) for number in range(-load.warmup, load.requests)]
        times = [0.0] * load.requests if load.rate is None else arrivals(load.rate, load.requests, rng)
        measured = [Planned(body, due) for body, due in zip(bodies[load.warmup :], times, strict=True)]
        return [Planned(body) for body in bodies[: load.warmup]], measured

    def _body(self, rng: random.Random, prefix: list[int], private: bool | None) -> bytes:
        if self.texts:
            prompt: str | list[int] = rng.choice(self.texts)
        else:
            prompt = prefix + self._random_tokens(rng, self.prompt_tokens.draw(rng))
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.output_tokens.draw(rng),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.token_ids:
            body["return_token_ids"] = True
        if private is not None:
            body["private"] = private
        if self.cache_salt is not None and private is not False:  # motserve keeps nothing of others, and says so
            body["cache_salt"] = self.cache_salt
        return json.dumps(body).encode()

    def _random_tokens(self, rng: random.Random, count: int) -> list[int]:
        if count == 0:
            return []
        assert self.vocabulary is not None
        return rng.choices(range(self.vocabulary), k=count)


def arrivals(rate: float, count: int, rng: random.Random) -> list[float]:
    """Seconds at which ``count`` requests come, ``rate`` a second on average: a Poisson process, whose gaps are
    exponentially distributed."""
    times, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times
