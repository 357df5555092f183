"""Groups against brute force: all ways to cut small lines of rows, the best of them by the stated order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.grouping import GroupingPolicy
from server.engine.plan import Chunk, Group, Plan
from server.engine.request import EngineRequest, SamplingParams, Sequence
from server.engine.spread import ANNEALED, LOSSES, MIXED, SpreadLoss, loss_at

Place = tuple[str, int]  # tenant and position of a decoding row


def plan_of(places: list[Place]) -> Plan:
    chunks = []
    for number, (tenant, position) in enumerate(places):
        request = EngineRequest(f"r{number}", ((1,) * position,), SamplingParams(max_tokens=4), tenant=tenant)
        chunks.append(Chunk(Sequence(request, 0, number), position, 1))
    return Plan(public=tuple(chunks))


def all_cuts(line: list[Place]) -> Iterator[list[list[Place]]]:
    """Every way to cut a sorted line into stretches."""
    if not line:
        yield []
    for size in range(1, len(line) + 1):
        for rest in all_cuts(line[size:]):
            yield [line[:size], *rest]


def spread(group: list[Place]) -> int:
    return group[-1][1] - group[0][1]


def cost(groups: list[list[Place]], loss: SpreadLoss) -> int:
    """As a sum over rows, in millionths of a nat; the tie is broken by the distances themselves."""
    return sum(len(group) * (round(loss.of(spread(group)) * 1_000_000) + spread(group)) for group in groups)


def brute_force(places: list[Place], policy: GroupingPolicy) -> tuple[int, int]:
    """The number of groups, and what the best such groups cost."""
    size, window = policy.group_size, policy.window
    possible = [
        groups
        for groups in all_cuts(sorted(places))
        if all(
            len(group) <= size and group[0][0] == group[-1][0] and (window is None or spread(group) < window)
            for group in groups
        )
    ]
    exact = min((groups for groups in possible if all(spread(group) == 0 for group in groups)), key=len)
    if len(exact) <= policy.max_groups:
        return len(exact), 0
    affordable = [groups for groups in possible if len(groups) <= policy.max_groups]
    fewest = min(len(groups) for groups in possible)
    allowed = affordable or [groups for groups in possible if len(groups) == fewest]
    best = min(cost(groups, policy.loss) for groups in allowed)
    return min(len(groups) for groups in allowed if cost(groups, policy.loss) == best), best


def members(places: list[Place], groups: tuple[Group, ...]) -> list[list[Place]]:
    return [sorted(places[row] for row in group.rows) for group in groups]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 60)), min_size=1, max_size=9),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 40)),
    st.integers(1, 9),
    st.sampled_from([MIXED, ANNEALED]),
)
@settings(max_examples=300, deadline=None)
def test_no_cut_within_the_limits_is_better(
    places: list[Place], size: int, window: int | None, most: int, loss: SpreadLoss
) -> None:
    policy = GroupingPolicy(size, window, most, loss)
    groups = members(places, policy.plan(plan_of(places)))
    assert (len(groups), cost(groups, loss)) == brute_force(places, policy)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30), st.integers(1, 4)), max_size=20),
    st.integers(1, 6),
    st.integers(1, 8),
)
@settings(max_examples=100, deadline=None)
def test_a_plan_is_the_same_again_and_does_not_depend_on_the_other_tenants_names(
    runs: list[tuple[str, int, int]], size: int, most: int
) -> None:
    places = [(tenant, position) for tenant, position, count in runs for _ in range(count)]
    policy = GroupingPolicy(size, None, most)
    groups = policy.plan(plan_of(places))
    assert groups == policy.plan(plan_of(places))
    renamed = [(tenant.upper() + "x", position) for tenant, position in places]
    assert groups == policy.plan(plan_of(renamed))
    for group in groups:
        # Companions stand in order of position, and of admission where that is equal.
        assert list(group.rows) == sorted(group.rows, key=lambda row: (places[row][1], row))


def test_the_limit_holds_for_all_tenants_together_and_the_nearest_merge_wherever_they_are() -> None:
    places = [("a", 10), ("a", 50), ("b", 20), ("b", 21), ("c", 5)]
    groups = GroupingPolicy(4, None, 4).plan(plan_of(places))
    assert sorted(group.rows for group in groups) == [(0,), (1,), (2, 3), (4,)]
    assert len(GroupingPolicy(4, None, 1).plan(plan_of(places))) == 3, "tenants never mix"


@pytest.mark.parametrize("loss", LOSSES.values())
def test_loss_rises_with_distance_and_is_the_measured_one_where_it_was_measured(loss: SpreadLoss) -> None:
    costs = loss.costs(np.arange(300))
    assert (np.diff(costs) > 0).all() and costs[0] == 0
    assert [loss.of(spread) for spread in loss.spreads] == list(loss.nats)
    assert loss.of(6) == pytest.approx((loss.of(4) + loss.of(8)) / 2)
    assert loss.of(10_000) == loss.nats[-1]


def test_the_table_measured_nearer_to_the_temperature() -> None:
    assert (loss_at(1.0), loss_at(0.5), loss_at(0.1), loss_at(0.01)) == (MIXED, MIXED, ANNEALED, ANNEALED)
