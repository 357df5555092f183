"""What answers amount to: tokens of chunks, inter-token times, percentiles, figures of a load."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients._load import Load
from clients._results import Answer, AnswerReader, Failure, Limits, percentile, summarize
from clients.errors import ProtocolError


def chunk(text: str = "", ids: list[int] | None = None, **rest: Any) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "text": text}
    return {"choices": [choice if ids is None else {**choice, "token_ids": ids}], **rest}


def read(*pieces: tuple[float, list[dict[str, Any]]], due: float = 10.0) -> Answer:
    reader = AnswerReader(due)
    for now, chunks in pieces:
        reader.take(chunks, now)
    return reader.finish(pieces[-1][0])


def usage(count: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}, "mot": {"private": True}}


def test_token_ids_count_the_tokens_of_a_chunk() -> None:
    answer = read(
        (11.0, [chunk("a", [1])]),
        (11.5, [chunk("bc", [2, 3])]),
        (12.0, [chunk("", [4]), chunk("d", [5])]),  # together: one arrival of two tokens, one without text yet
        (12.1, [chunk("", []), usage(5)]),
    )
    assert (answer.ttft, answer.seconds, answer.output_tokens, answer.prompt_tokens) == pytest.approx((1.0, 2.1, 5, 7))
    assert answer.inter_token == pytest.approx((0.25,) * 4)
    assert answer.per_token == pytest.approx(0.25) and answer.private


def test_usage_is_spread_over_chunks_of_unknown_size() -> None:
    answer = read((11.0, [chunk("ab")]), (11.4, [chunk("cd")]), (12.0, [chunk("ef"), chunk("", finish=1), usage(6)]))
    assert answer.output_tokens == 6
    assert answer.inter_token == pytest.approx((0.2, 0.3))
    assert answer.per_token == pytest.approx(1.0 / 4)


def test_without_usage_every_chunk_with_text_is_a_token() -> None:
    answer = read((11.0, [chunk("")]), (11.5, [chunk("a")]), (12.5, [chunk("b")]), (13.0, [chunk("")]))
    assert (answer.ttft, answer.output_tokens, answer.prompt_tokens, answer.private) == (1.5, 2, None, False)
    assert answer.inter_token == (1.0,)


def test_a_single_token_has_no_inter_token_time() -> None:
    answer = read((11.0, [chunk("a"), usage(1)]))
    assert (answer.inter_token, answer.per_token) == ((), None)
    nothing = read((11.0, [usage(0)]))
    assert (nothing.ttft, nothing.output_tokens) == (1.0, 0)


@pytest.mark.parametrize(
    "bad", [{"object": "x"}, {"choices": [3]}, {"choices": [{"delta": {}}]}, chunk("a", usage=5), chunk("a", mot=5)]
)
def test_what_is_no_completion_is_told(bad: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        read((11.0, [bad]))


def test_usage_without_numbers_is_told() -> None:
    with pytest.raises(ProtocolError, match="completion_tokens"):
        read((11.0, [chunk("a", usage={"completion_tokens": "many"})]))


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=60))
def test_percentiles(values: list[float]) -> None:
    wanted = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (1, 50, 99):
        assert percentile(values, percent) == pytest.approx(wanted[percent - 1], rel=1e-9, abs=1e-9)
    assert percentile(values, 100) == max(values) and percentile(values[:1], 99) == values[0]
    assert percentile([], 50) is None


def answered(ttft: float, inter_token: list[float], seconds: float = 1.0) -> Answer:
    per_token = statistics.mean(inter_token) if inter_token else None
    return Answer(seconds, ttft, tuple(inter_token), per_token, 4, len(inter_token) + 1, True)


def test_figures_of_a_load() -> None:
    outcomes = [
        answered(0.1, [0.01, 0.03]),
        answered(0.3, [0.02]),
        answered(0.2, [0.5]),
        answered(0.2, []),
        Failure(2.0, "429", "full"),
        Failure(1.0, "429", "later"),
        Failure(1.0, "timeout", "late"),
        Failure(0.0, "connection", "gone"),
    ]
    result = summarize(Load(8, None, rate=3.0), outcomes, Limits(0.25, 0.05), seconds=4.0, cpu=1.0)
    assert (result.requests, result.errors) == (8, 4)
    assert result.errors_by_kind == {"429": 2, "timeout": 1, "connection": 1}
    assert result.first_error == "full"
    assert (result.concurrency, result.rate, result.private_share) == (2.0, 3.0, 1.0)
    assert result.output_tokens_per_second == pytest.approx((3 + 2 + 2 + 1) / 4)
    assert (result.requests_per_second, result.prompt_tokens, result.output_tokens) == (1.0, 4, 2)
    assert (result.goodput, result.goodput_requests_per_second) == (2 / 8, 2 / 4)  # the first and the fourth
    assert (result.ttft_p50, result.itl_p50) == pytest.approx((0.2, 0.025))
    assert result.client_cpu == 0.25
    failed = summarize(Load(1, 1), outcomes[-1:], Limits(), seconds=1.0, cpu=0.0)
    assert (failed.ttft_p50, failed.itl_p99, failed.output_tokens, failed.goodput) == (None, None, None, 0)
    json.dumps(failed.as_dict(), allow_nan=False)
