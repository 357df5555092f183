"""What came of a load: each answer's times, and the figures that they add up to. Pure: is told the time.

How inter-token times are counted. Bytes that arrive together make one *arrival*. When its choices carry ``token_ids``,
its tokens are known: a gap before ``k`` tokens counts as ``k`` times a ``k``-th of it. Otherwise the tokens that the
answer's ``usage`` reports are spread evenly over its arrivals with text, and without ``usage`` each has one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from clients._load import Load
from clients.errors import ProtocolError


@dataclass(frozen=True)
class Answer:
    """Of one request, answered whole. ``seconds`` from when it was due to its end, ``ttft`` to its first token;
    ``per_token`` is its mean inter-token time, None for a single token."""

    seconds: float
    ttft: float
    inter_token: tuple[float, ...]
    per_token: float | None
    prompt_tokens: int | None
    output_tokens: int
    private: bool


@dataclass(frozen=True)
class Failure:
    """``kind``: an HTTP status, ``connection``, ``timeout`` or ``stream`` (one that broke off or told of an error)."""

    seconds: float
    kind: str
    message: str


Outcome = Answer | Failure


class AnswerReader:
    """One answer as it comes. ``due``: when its request was, on the clock that ``take`` and ``finish`` are told."""

    def __init__(self, due: float) -> None:
        self._due = due
        self._arrivals: list[tuple[float, int | None]] = []  # seconds after ``due``; tokens, None: unknown
        self._usage: Mapping[str, Any] = {}
        self._private = False

    def take(self, chunks: Iterable[Mapping[str, Any]], now: float) -> None:
        """The chunks that one piece of the stream held. Raises ProtocolError when they are no completion's."""
        text, tokens = False, 0
        for chunk in chunks:
            try:
                for choice in chunk["choices"]:
                    text |= bool(choice["text"])
                    tokens += len(choice.get("token_ids") or ())
                self._usage = dict(chunk.get("usage") or self._usage)
                self._private |= (chunk.get("mot") or {}).get("private") is True
            except (AttributeError, KeyError, TypeError, ValueError):
                raise ProtocolError("The stream holds an object that is not a completion's chunk.") from None
        if text or tokens:
            self._arrivals.append((now - self._due, tokens or None))

    def finish(self, now: float) -> Answer:
        """Raises ProtocolError when the usage holds no numbers."""
        seconds = now - self._due
        known = sum(tokens for _, tokens in self._arrivals if tokens is not None)
        guessed = sum(tokens is None for _, tokens in self._arrivals)
        total = _count(self._usage, "completion_tokens")
        if total is None:
            total = known + guessed
        each = (total - known) / guessed if guessed and total > known else 1.0
        inter_token: list[float] = []
        later = 0.0  # tokens after the first arrival
        for (before, _), (after, tokens) in pairwise(self._arrivals):
            inter_token += [(after - before) / (tokens or each)] * (tokens or 1)
            later += tokens or each
        per_token = (self._arrivals[-1][0] - self._arrivals[0][0]) / later if later else None
        return Answer(
            seconds,
            self._arrivals[0][0] if self._arrivals else seconds,
            tuple(inter_token),
            per_token,
            _count(self._usage, "prompt_tokens"),
            total,
            self._private,
        )


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    if value is not None and type(value) is not int:
        raise ProtocolError(f"The stream's usage says {name} without a number.")
    return value


@dataclass(frozen=True)
class Limits:
    """What a request may take to count as good: seconds to its first token, and a token after it on average."""

    ttft: float | None = None
    inter_token: float | None = None

    def met_by(self, answer: Answer) -> bool:
        slow_start = self.ttft is not None and answer.ttft > self.ttft
        slow = self.inter_token is not None and (answer.per_token or 0.0) > self.inter_token
        return not slow_start and not slow


@dataclass(frozen=True)
class LoadResult:
    """Of one setting. Rates and times are of answered requests, over the ``seconds`` from the first one's start to the
    last one's end; None where there is nothing to tell from. ``concurrency`` of an open loop: requests under way, on
    average. ``private_share`` where requests did not say: that of the server's receipts. ``prompt_tokens`` and
    ``output_tokens``: means. ``goodput``: the share of all requests that were answered within the limits.
    ``client_cpu``: cores that the load generator itself kept busy; near 1, it is what is being measured."""

    concurrency: float
    rate: float | None
    private_share: float
    requests: int
    errors: int
    seconds: float
    prompt_tokens: float | None
    output_tokens: float | None
    output_tokens_per_second: float
    requests_per_second: float
    ttft_p50: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p99: float | None
    goodput: float
    goodput_requests_per_second: float
    client_cpu: float
    errors_by_kind: Mapping[str, int]
    first_error: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(load: Load, outcomes: Sequence[Outcome], limits: Limits, seconds: float, cpu: float) -> LoadResult:
    """``outcomes`` in the order of their ends, at least one; ``cpu``: processor seconds of this process."""
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    times_to_first = [answer.ttft for answer in answers]
    inter_token = [time for answer in answers for time in answer.inter_token]
    good = sum(map(limits.met_by, answers))
    under_way = sum(outcome.seconds for outcome in outcomes) / seconds
    seen_private = sum(answer.private for answer in answers) / len(answers) if answers else 0.0
    prompts = [answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]
    return LoadResult(
        concurrency=under_way if load.concurrency is None else load.concurrency,
        rate=load.rate,
        private_share=seen_private if load.private_share is None else load.private_share,
        requests=len(outcomes),
        errors=len(failures),
        seconds=seconds,
        prompt_tokens=_mean(prompts),
        output_tokens=_mean([answer.output_tokens for answer in answers]),
        output_tokens_per_second=sum(answer.output_tokens for answer in answers) / seconds,
        requests_per_second=len(answers) / seconds,
        ttft_p50=percentile(times_to_first, 50),
        ttft_p99=percentile(times_to_first, 99),
        itl_p50=percentile(inter_token, 50),
        itl_p99=percentile(inter_token, 99),
        goodput=good / len(outcomes),
        goodput_requests_per_second=good / seconds,
        client_cpu=cpu / seconds,
        errors_by_kind=dict(Counter(failure.kind for failure in failures).most_common()),
        first_error=failures[0].message if failures else None,
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Between two values in proportion, as numpy's default; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None
