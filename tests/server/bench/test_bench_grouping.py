"""Traces, costs and replays of grouping policies: totals add up, the bundled trace is what the code makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from server.bench.grouping import Replay, policies
from server.bench.step_cost import StepCost, parse_cost
from server.bench.trace import BUNDLED, Arrival, read_trace, synthetic_trace, write_trace
from server.cli import app
from server.engine.grouping import GroupingPolicy
from server.engine.spread import ANNEALED

COST = parse_cost("20,1,0.1")


def test_the_bundled_trace_is_the_synthetic_one_and_small(tmp_path: Path) -> None:
    write_trace(synthetic_trace(0), tmp_path / "made.csv")
    assert (tmp_path / "made.csv").read_bytes() == BUNDLED.read_bytes()
    trace = read_trace(BUNDLED)
    assert trace == synthetic_trace(0) != synthetic_trace(1)
    assert BUNDLED.stat().st_size < 30_000
    assert max(arrival.prompt_tokens + arrival.output_tokens for arrival in trace) <= 256
    assert len(trace) / trace[-1].seconds == pytest.approx(12, rel=0.3)


def test_a_trace_of_tenants_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("prompt_tokens,arrival,output_tokens,tenant\n3,2.5,4,a\n1,0,2,\n")
    assert read_trace(file) == [Arrival(0.0, 1, 2), Arrival(2.5, 3, 4, "a")]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "arrival"),
        ("arrival,prompt_tokens\n0,1\n", "output_tokens"),
        ("arrival,prompt_tokens,output_tokens\n", "no requests"),
        ("arrival,prompt_tokens,output_tokens\n0,1,2\n0,x,2\n", "line 3"),
        ("arrival,prompt_tokens,output_tokens\n0,1\n", "line 2"),
        ("arrival,prompt_tokens,output_tokens\n-1,1,2\n", "arrival"),
        ("arrival,prompt_tokens,output_tokens\nnan,1,2\n", "arrival"),
        ("arrival,prompt_tokens,output_tokens\n0,0,2\n", "prompt_tokens"),
    ],
)
def test_mistakes_in_a_trace_name_their_place(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=named) as error:
        read_trace(file)
    assert str(file) in str(error.value)


@given(st.lists(st.floats(0.001, 10), min_size=3, max_size=3), st.integers(1, 300), st.integers(0, 300))
def test_a_given_cost_is_a_plane(parts: list[float], groups: int, rows: int) -> None:
    cost = parse_cost(",".join(map(repr, parts)))
    read, group, row = parts
    assert cost.of(groups, rows) == pytest.approx((read + group * groups + row * rows) / 1000)
    assert cost.balance == max(1, min(256, round((read + group) / group)))


@pytest.mark.parametrize("text", ["", "1,2", "1,2,x", "-1,2,3", "nan,1,1", "0,0,1", "inf,1,1"])
def test_what_is_no_cost_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="step_cost"):
        parse_cost(text)


def test_a_measured_cost_goes_through_its_points_and_on() -> None:
    cost = StepCost(1.0, 0.5, (1, 4, 8), (2.0, 5.0, 7.0))
    assert [cost.experts(count) for count in (1, 2, 4, 6, 8, 10)] == [2.0, 3.0, 5.0, 6.0, 7.0, 8.0]
    assert cost.of(4, 6) == 9.0 and cost.of(0, 2) == 2.0


def test_one_request_alone_takes_what_its_steps_take() -> None:
    trace = [Arrival(5.0, 7, 4, "a")]
    result = Replay(trace, GroupingPolicy(4), parse_cost("10,1,0.5")).run("lone")
    # The prompt is seven groups of one; its step samples the first token, three more decode the rest.
    prompt, step = 0.010 + 7 * 0.0015, 0.0115
    assert result.steps == 4 and result.requests == 1
    assert result.request_seconds == pytest.approx(prompt + 3 * step)
    assert result.output_tokens_per_second == pytest.approx(4 / (prompt + 3 * step))
    assert (result.live_members, result.groups_per_step, result.lone_share) == (1.0, 1.0, 1.0)
    assert result.step_seconds == pytest.approx(step)
    assert result.expected_loss == result.position_spread == 0.0


def test_two_requests_two_positions_apart_mix_at_the_loss_of_that_distance() -> None:
    trace = [Arrival(0.0, 5, 4, ""), Arrival(0.0, 7, 4, "")]
    result = Replay(trace, GroupingPolicy(4, None, 1, ANNEALED), COST).run("any")
    assert (result.live_members, result.position_spread, result.lone_share) == (2.0, 2.0, 0.0)
    assert result.expected_loss == pytest.approx(0.005)
    apart = Replay([trace[0], replace(trace[1], tenant="b")], GroupingPolicy(4, None, 1, ANNEALED), COST).run("any")
    assert (apart.live_members, apart.lone_share) == (1.0, 1.0)


@given(
    st.lists(
        st.builds(
            Arrival, st.floats(0, 2), st.integers(1, 40), st.integers(1, 20), st.sampled_from(["", "a"])
        ), min_size=1, max_size=15,
    ),
    st.sampled_from([0.0, 0.3]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_policy_finishes_the_trace_and_measures_stay_in_their_ranges(trace: list[Arrival], wait: float) -> None:
    tokens = sum(arrival.output_tokens for arrival in trace)
    found = {
        name: Replay(trace, policy, COST, prefill_tokens=32, align_wait=wait).run(name)
        for name, policy in policies(4, [4, 16], GroupingPolicy(4, None, 3)).items()
    }
    assert {result.requests for result in found.values()} == {len(trace)}
    assert list(found) == ["exact", "window 4", "window 16", "any", "adaptive"]
    assert found["exact"].expected_loss == 0.0 == found["exact"].position_spread
    for result in found.values():
        assert 1 <= result.steps <= tokens + sum(arrival.prompt_tokens for arrival in trace) + 100
        assert 0 <= result.lone_share <= 1
        assert result.expected_loss <= 0.16


def test_alignment_makes_companions_at_equal_positions() -> None:
    trace = [Arrival(0.0, 8, 60), Arrival(0.2, 24, 30)]
    alone = Replay(trace, GroupingPolicy(4, 1), COST).run("exact")
    aligned = Replay(trace, GroupingPolicy(4, 1), COST, align_wait=2.0).run("exact")
    assert alone.live_members == 1.0 < aligned.live_members


def test_the_command_prints_an_object_a_policy(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    write_trace(synthetic_trace(3, 40), file)
    arguments = ["bench", "grouping", "--trace", str(file), "--step-cost", "4,0.4,0.3", "--windows", "8"]
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    results = [json.loads(line) for line in found.stdout.splitlines()]
    assert [result["policy"] for result in results] == ["exact", "window 8", "any", "adaptive"]
    assert {"live_members", "groups_per_step", "position_spread", "output_tokens_per_second", "expected_loss"} <= set(
        results[0]
    )
    assert {result["max_groups"] for result in results} == {11} and results[0]["loss"] == "own"
    faster = CliRunner().invoke(app, [*arguments, "--json", "--speed", "4", "--loss", "mixed"])
    again = [json.loads(line) for line in faster.stdout.splitlines()]
    assert again[2]["live_members"] > results[2]["live_members"] and again[2]["loss"] == "mixed"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--windows", "4,auto"), "windows"),
        (("--shape", "huge"), "shape"),
        (("--shape", "gpt2-small"), "shape"),
        (("--loss", "small"), "loss"),
        (("--speed", "0"), "speed"),
        (("--step-cost", "1"), "step_cost"),
        (("--trace", "/nowhere.csv"), "nowhere"),
    ],
)
def test_a_mistake_is_told_in_one_line(flags: tuple[str, ...], named: str) -> None:
    found = CliRunner().invoke(app, ["bench", "grouping", "--step-cost", "1,1,1", *flags])
    assert found.exit_code == 2
    assert named in found.stderr and "Traceback" not in found.output


def test_adaptive_grouping_on_the_bundled_trace_is_nearly_as_fast_as_the_best_window_and_loses_less() -> None:
    """With costs as of the bundled checkpoint on two slow cores."""
    cost, trace = parse_cost("4,0.4,0.3"), read_trace(BUNDLED)
    found = {
        name: Replay(trace, policy, cost).run(name)
        for name, policy in policies(16, [4, 16, 64], GroupingPolicy(16, None, cost.balance, ANNEALED)).items()
    }
    best = max((found[f"window {window}"] for window in (4, 16, 64)), key=lambda r: r.output_tokens_per_second)
    assert found["adaptive"].output_tokens_per_second >= 0.95 * best.output_tokens_per_second
    assert found["adaptive"].expected_loss < best.expected_loss
