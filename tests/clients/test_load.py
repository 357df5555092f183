"""What the load generator sends and when: lengths, shares, arrivals, bodies."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clients._load import Lengths, Load, Traffic, arrivals

TRAFFIC = Traffic(Lengths(3, 3), Lengths(2, 2), "demo", 50)


def bodies(traffic: Traffic, load: Load) -> list[dict[str, Any]]:
    return [json.loads(planned.body) for planned in traffic.plan(load)[1]]


@given(st.integers(1, 9_999_999), st.integers(1, 9_999_999), st.randoms(use_true_random=False))
def test_lengths_are_numbers_or_ranges(one: int, other: int, rng: random.Random) -> None:
    low, high = sorted((one, other))
    lengths = Lengths.parse("prompt_tokens", f"{low}:{high}")
    assert lengths == Lengths(low, high)
    assert low <= lengths.draw(rng) <= high
    assert Lengths.parse("prompt_tokens", str(low)) == Lengths(low, low)
    if low < high:
        with pytest.raises(ValueError, match=r"^prompt_tokens: "):
            Lengths.parse("prompt_tokens", f"{high}:{low}")


@given(st.text(st.sampled_from("0123456789:-. \n٣"), max_size=8) | st.text(max_size=8))
def test_anything_else_is_refused(text: str) -> None:
    assume(not re.fullmatch("[0-9]+(:[0-9]+)?", text) or {"0"} & {part.lstrip("0") or "0" for part in text.split(":")})
    with pytest.raises(ValueError, match=r"^output_tokens: "):
        Lengths.parse("output_tokens", text)


def test_a_range_is_used_in_full() -> None:
    rng = random.Random(0)
    assert {Lengths(2, 4).draw(rng) for _ in range(100)} == {2, 3, 4}


@given(st.floats(0, 1), st.integers(1, 200), st.integers(0, 20))
def test_private_requests_are_spread_evenly(share: float, requests: int, warmup: int) -> None:
    load = Load(requests, 1, private_share=share, warmup=warmup)
    private = 0
    for number in range(requests):
        private += bool(load.private(number))
        assert abs(private - share * (number + 1)) <= 0.5 + 1e-9
    assert [body["private"] for body in bodies(TRAFFIC, load)] == [load.private(n) for n in range(requests)]


def test_the_same_seed_gives_the_same_load() -> None:
    load = Load(20, None, rate=5.0, warmup=3)
    assert TRAFFIC.plan(load) == TRAFFIC.plan(load)
    other = Traffic(Lengths(3, 3), Lengths(2, 2), "demo", 50, seed=1)
    assert TRAFFIC.plan(load)[1] != other.plan(load)[1]
    assert [p.due for p in TRAFFIC.plan(load)[1]] != [p.due for p in other.plan(load)[1]]
    warmup, measured = TRAFFIC.plan(load)
    assert (len(warmup), len(measured)) == (3, 20)


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(8.0, 20_000, random.Random(3))
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.03)  # as exponential gaps have it
    assert sum(gap > 1 / 8 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.015)


def test_bodies_say_what_was_asked_for() -> None:
    traffic = Traffic(
        Lengths(4, 9), Lengths(5, 7), "demo", 30, shared_prefix=6, cache_salt="s", token_ids=True, temperature=0
    )
    sent = bodies(traffic, Load(40, 2, private_share=0.5))
    prompts = [body["prompt"] for body in sent]
    assert {tuple(prompt[:6]) for prompt in prompts} == {tuple(prompts[0][:6])}
    assert len({tuple(prompt) for prompt in prompts}) == 40
    assert {len(prompt) - 6 for prompt in prompts} == set(range(4, 10))
    assert {body["max_tokens"] for body in sent} == {5, 6, 7}
    assert all(0 <= token < 30 for prompt in prompts for token in prompt)
    assert all(body["ignore_eos"] and body["stream"] and body["return_token_ids"] for body in sent)
    assert all(body["stream_options"] == {"include_usage": True} and body["temperature"] == 0 for body in sent)
    assert [body.get("cache_salt") for body in sent] == ["s" if body["private"] else None for body in sent]
    assert bodies(traffic, Load(40, 4, private_share=0.5))[0]["prompt"][:6] == prompts[0][:6]


def test_nothing_is_sent_that_was_not_asked_for() -> None:
    traffic = Traffic(Lengths(1, 1), Lengths(5, 5), "demo", texts=("one", "two"), ignore_eos=False)
    sent = bodies(traffic, Load(20, 1))
    assert {body["prompt"] for body in sent} == {"one", "two"}
    assert set(sent[0]) == {"model", "prompt", "max_tokens", "stream", "stream_options"}
