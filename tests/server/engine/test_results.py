"""News of sequences: the same however many tokens a piece of it has, and never too much of it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import Settings
from server.engine.engine import Engine
from server.engine.request import Delta, EngineRequest, Privacy, SamplingParams
from server.engine.results import Pace
from server.loading import load
from tests.server.engine.traffic import SMALL, alone


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    yield load(Settings(kv_cache_memory=2**26)).engine.direct


def _joined(news: list[Delta], index: int) -> tuple[object, ...]:
    """All that one sequence was told."""
    mine = [delta for delta in news if delta.sequence_index == index]
    assert [delta.finish_reason is not None for delta in mine] == [False] * (len(mine) - 1) + [True]
    assert all(delta.prompt_logprobs is None for delta in mine[1:])
    return (
        "".join(delta.text for delta in mine),
        [token for delta in mine for token in delta.token_ids],
        [entry for delta in mine for entry in delta.logprobs],
        mine[0].prompt_logprobs,
        mine[-1][5:],
    )


@given(
    interval=st.one_of(st.none(), st.integers(2, 40)),
    max_tokens=st.integers(0, 30),
    stop=st.sampled_from([(), ("e",), (" the",), (", and", ".")]),
    scored=st.booleans(),
)
def test_news_say_the_same_in_pieces_of_any_size(
    engine: Engine, interval: int | None, max_tokens: int, stop: tuple[str, ...], scored: bool
) -> None:
    sampling = SamplingParams(max_tokens, seed=max_tokens, stop=stop, logprobs=2 if scored else None, ignore_eos=True)
    if scored:
        sampling = dataclasses.replace(sampling, prompt_logprobs=1)
    request = EngineRequest("r", ((11, 12, 13),), sampling, n=2, privacy=Privacy(engine.config.temperature, 0.0))
    one_by_one = alone(engine, request)
    news = alone(engine, dataclasses.replace(request, stream_interval=interval))
    for index in range(2):
        assert _joined(news, index) == _joined(one_by_one, index)
        sizes = [len(delta.token_ids) for delta in news if delta.sequence_index == index]
        if interval is not None:
            assert all(size == interval for size in sizes[1:-1])
            assert sizes[0] <= 1  # a first token waits for no other
            assert sizes[-1] <= interval


def test_under_load_sequences_take_turns_to_be_told_of(build_engine: Any) -> None:
    engine = build_engine(SMALL, blocks=60)
    sampling = SamplingParams(max_tokens=30, ignore_eos=True)
    for number in range(6):
        engine.add(EngineRequest(f"r{number}", ((1, 2),), sampling, stream_interval=None))
    told: dict[str, list[int]] = {f"r{number}": [] for number in range(6)}
    at_once = []
    while not engine.idle:
        engine.results.pace.interval = 3  # whatever this machine takes for a step
        news = engine.step()
        at_once.append(len(news))
        for request_id, delta in news:
            told[request_id].append(len(delta.token_ids))
    assert at_once[0] == at_once[-1] == 6, "first and last tokens wait for nothing"
    assert set(at_once[1:-1]) == {2}, "a third of them each step"
    assert all(sum(sizes) == 30 and set(sizes[2:-1]) == {3} and max(sizes) == 3 for sizes in told.values())


def test_nothing_is_left_of_news_held_back_when_a_request_goes_away(engine: Engine) -> None:
    engine.add(EngineRequest("gone", ((1, 2),), SamplingParams(50, ignore_eos=True), stream_interval=32))
    told = [delta for _ in range(5) for _, delta in engine.step()]
    assert [len(delta.token_ids) for delta in told] == [1]
    engine.abort("gone")
    assert engine.idle
    assert not engine.results._under_way


def test_who_makes_room_is_told_what_was_held_back(build_engine: Any) -> None:
    engine = build_engine(SMALL, blocks=20, swap_blocks=20, prefill_tokens=2000)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    engine.add(EngineRequest("patient", ((7,) * 150,), sampling, priority=1, stream_interval=32))
    news = [entry for _ in range(5) for entry in engine.step()]
    assert [len(delta.token_ids) for _, delta in news] == [1], "four more are held back"
    engine.add(EngineRequest("urgent", ((5,) * 170,), SamplingParams(max_tokens=40, ignore_eos=True)))
    told = dict(engine.step())
    assert engine.scheduler._swapped_blocks > 0
    assert len(told["patient"].token_ids) == 4
    while not engine.idle:
        news += engine.step()
    mine = [delta for request_id, delta in news if request_id == "patient"]
    assert sum(len(delta.token_ids) for delta in mine) + 4 == 40 and mine[-1].finish_reason == "length"


@given(st.integers(0, 5000), st.floats(1e-5, 5), st.floats(10, 1e4), st.floats(1e-3, 1))
def test_pace(sequences: int, seconds: float, most: float, longest: float) -> None:
    """Against the definition: the least number that keeps the rate, if a token does not wait too long for it, and where
    the rate is exceeded by half."""
    pace = Pace(most, longest)
    pace.on_step(sequences, seconds)
    some, near = 1 - 1e-9, 1 + 1e-9  # for what division rounds away
    rate = sequences / seconds
    assert pace.interval == 1 or pace.interval * seconds <= longest * near
    kept = rate / pace.interval <= most * near or (pace.interval == 1 and rate <= 1.5 * most * near)
    assert kept or (pace.interval + 1) * seconds > longest * some
    assert pace.interval == 1 or (rate > 1.5 * most * some and rate / (pace.interval - 1) > most * some)


def test_pace_follows_the_load() -> None:
    pace = Pace(most=1000, longest=0.1)
    for _ in range(100):
        pace.on_step(1, 0.01)
    assert pace.interval == 1
    for _ in range(100):
        pace.on_step(64, 0.01)
    assert pace.interval == math.ceil(6.4)
    for _ in range(100):
        pace.on_step(64, 0.2)
    assert pace.interval == 1


@pytest.mark.parametrize(("cores", "interval"), [(1, 20), (2, 10), (8, 3), (64, 3)])
def test_pace_by_the_cores_there_are(monkeypatch: pytest.MonkeyPatch, cores: int, interval: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    pace = Pace()
    pace.on_step(50, 0.005)  # 10,000 a second
    assert pace.interval == interval
