"""Prompts that wait for others: the rule against brute force, the real scheduler in virtual time against its bounds."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bench.grouping import Replay
from server.bench.shapes import random_model
from server.bench.step_cost import parse_cost
from server.bench.trace import Arrival
from server.config import read_settings
from server.engine.block_manager import BlockManager
from server.engine.gathering import Gathering, _Slope, one_more_is_worth_it, prompt_groups
from server.engine.grouping import GroupingPolicy
from server.engine.plan import Chunk, Plan
from server.engine.request import EngineRequest, SamplingParams, Sequence, Status
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.loading import build_engine
from tests.server.engine.traffic import SMALL
from tests.server.engine.virtual import Coming, World, arrivals

GROUP = 4
BASE, PER_GROUP = 1.0, 0.5  # seconds of a step, and of each group of prompt tokens in it


def world_of(wait: float) -> World:
    """Steps take what their groups of prompt tokens make them take."""

    def scheduler(clock: Callable[[], float]) -> Scheduler:
        limits = SchedulerLimits(60, 40, cohort=GROUP)
        return Scheduler(BlockManager(900, 16), limits, gathering=Gathering(GROUP, wait, clock))

    return World(scheduler, lambda plan: BASE + PER_GROUP * prompt_groups(plan, GROUP))


@given(st.floats(0.001, 10.0), st.floats(0.0, 100.0))
def test_as_many_gather_as_wait_least(gap: float, delay: float) -> None:
    most = 200
    shares = [delay / n + (n - 1) * gap / 2 for n in range(1, most)]
    count = 1
    while count < most - 1 and one_more_is_worth_it(count, gap, delay):
        count += 1
    assert shares[count - 1] <= min(shares) * (1 + 1e-9)


@given(st.lists(st.tuples(st.sampled_from(["", "b"]), st.sampled_from([0, 3, 8]), st.integers(1, 9)), max_size=20))
def test_groups_of_prompts_are_those_that_grouping_makes(wanted: list[tuple[str, int, int]]) -> None:
    chunks = []
    for number, (tenant, start, length) in enumerate(wanted):
        request = EngineRequest(f"r{number}", ((0,) * 40,), SamplingParams(max_tokens=1), tenant=tenant)
        chunks.append(Chunk(Sequence(request, 0, number), start, length))
    cohorts = {(c.sequence.request.tenant, c.start): c.length for c in chunks}
    alike = [Chunk(c.sequence, c.start, cohorts[c.sequence.request.tenant, c.start]) for c in chunks]
    # Cohorts from different places fill groups of their own as long as their stretches do not meet.
    apart = [c for c in alike if c.end <= min((s for t, s in cohorts if s > c.start), default=99)]
    plan = Plan(public=tuple(apart))
    assert prompt_groups(plan, GROUP) == len(GroupingPolicy(GROUP).plan(plan))


@given(st.lists(st.integers(0, 200), min_size=2, max_size=60), st.floats(0.001, 1.0), st.floats(0.0, 5.0))
def test_what_a_group_costs_is_found(groups: list[int], per_group: float, base: float) -> None:
    slope = _Slope()
    for count in groups:
        slope.add(count, base + per_group * count)
    if len(set(groups)) == 1:
        assert slope.per_group == pytest.approx(0.0, abs=1e-3)
    else:
        assert slope.per_group == pytest.approx(per_group, rel=1e-3)
    for count in range(400):  # steps become twice as fast
        slope.add(count % 7, (base + per_group * (count % 7)) / 2)
    assert slope.per_group == pytest.approx(per_group / 2, rel=1e-3)


@given(arrivals(steps=30, prompt=50, n=3, most=16), st.sampled_from([0.5, 5.0, 30.0, 1e6]), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_nobody_waits_beyond_the_bounds_or_for_nothing(wanted: list[Coming], wait: float, seed: int) -> None:
    rng, world = random.Random(seed), world_of(wait)
    coming = sorted(wanted)
    first_chance: dict[Sequence, float] = {}
    number = 0
    while coming or not world.scheduler.idle:
        world.add_due(coming, number)
        running = [s for s in world.sequences if s.status is Status.RUNNING]
        if running and rng.random() < 0.05:
            world.scheduler.finish(rng.choice(running))
        began, busy = world.now, not world.scheduler.idle
        plan = world.step()
        assert plan.chunks or not busy, "a step does something"
        fresh = [s for s in world.sequences if s.status is Status.RUNNING and s.prefilling and s.computed == 0]
        for sequence in fresh:
            first_chance.setdefault(sequence, began)
        taken = {chunk.sequence for chunk in plan.chunks}
        if all(chunk.decodes for chunk in plan.chunks):  # or else it may have been full
            held = [s for s in fresh if s not in taken and not s.private]
            for tenant in {s.request.tenant for s in held}:
                same = [s for s in held if s.request.tenant == tenant]
                assert len(same) < GROUP
                assert all(began < first_chance[s] + wait for s in same)
        number += 1
        assert number < 40 + sum(n * (prompt + output) for _, prompt, output, n, _, _ in wanted) * 3
    assert world.finished()


def busy_world(wait: float, *, gap: int, tenant: str = "") -> World:
    """Ten requests under way; then one every ``gap`` steps until that rate is known, whose prompts are computed."""
    world = world_of(wait)
    for _ in range(10):
        world.add(8, 500, tenant=tenant)
    for _ in range(4):
        world.step()
    for _ in range(12):
        world.add(8, 300, tenant=tenant)
        for _ in range(gap):
            world.step()
    while any(s.prefilling for s in world.sequences):
        world.step()
    return world


def steps_until_begun(world: World, sequence: Sequence, most: int = 200) -> int:
    for steps in range(1, most):
        world.step()
        if sequence.computed:
            return steps
    raise AssertionError("never begun")


def test_prompts_that_come_close_together_are_computed_together() -> None:
    world = busy_world(1000.0, gap=2)
    late = []
    for _ in range(GROUP):
        assert all(s.computed == 0 for s in late), "they wait while fewer than G have come"
        late += world.add(8, 300)
        world.step()
        world.step()
    assert {s.computed for s in late} == {9}, "all of them begun in one step"


def test_where_nobody_else_comes_the_wait_ends_when_it_has_cost_what_it_could_save() -> None:
    world = busy_world(1000.0, gap=2)
    others = len(world.sequences)
    (late,) = world.add(8, 300)
    # One step waits BASE seconds; computing the prompt alone delays the others by 8 groups.
    assert steps_until_begun(world, late) == pytest.approx(others * 8 * PER_GROUP / BASE + 1, abs=3)
    world = busy_world(20.0, gap=2)
    (late,) = world.add(8, 300)
    assert steps_until_begun(world, late) == 21, "nor longer than allowed"


def test_nobody_waits_where_requests_are_rare_or_nobody_runs_or_for_another_tenant_or_in_private() -> None:
    rare = busy_world(1000.0, gap=110)
    assert steps_until_begun(rare, rare.add(8, 300)[0]) == 1
    world = busy_world(1000.0, gap=2)
    assert steps_until_begun(world, world.add(8, 300, private=True)[0]) == 1
    assert steps_until_begun(world, world.add(8, 300, tenant="new")[0]) == 1
    for sequence in world.sequences:
        world.scheduler.finish(sequence)
    assert steps_until_begun(world, world.add(8, 300)[0]) == 1


def test_a_busy_server_makes_more_tokens_where_prompts_gather() -> None:
    """Requests come as fast as they can just be served one by one."""
    trace = [Arrival(0.02 * number, 64, 32 + number % 5) for number in range(200)]
    cost = parse_cost("5,0.2,0.01")
    alone, gathered = (Replay(trace, GroupingPolicy(8), cost, prompt_wait=wait).run("adaptive") for wait in (0.0, 0.05))
    assert gathered.request_seconds < 0.9 * alone.request_seconds
    assert gathered.first_token_seconds < alone.first_token_seconds + 0.05


@pytest.mark.parametrize(("wait", "waits"), [(0.0, False), (60_000.0, True)])
def test_the_setting_reaches_a_real_engine(wait: float, waits: bool) -> None:
    model, fill = random_model(SMALL, dtype=torch.float32, device=torch.device("cpu"))
    engine = build_engine(read_settings({"max_prompt_wait": wait, "kernels": "plain"}, None), model, fill, None)
    assert (engine.scheduler._gathering is not None) == waits
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    for number in range(6):
        engine.add(EngineRequest(f"r{number}", (tuple(range(1, 16)),), sampling))
        engine.step()
    while not engine.idle:
        engine.step()
