"""Requests that wait for a group to reach their position: the real scheduler in virtual time, against the rule written
out plainly, and against its bounds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bench.shapes import random_model
from server.config import read_settings
from server.engine.alignment import Alignment
from server.engine.block_manager import BlockManager
from server.engine.plan import Plan
from server.engine.request import EngineRequest, SamplingParams, Sequence, Status
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.loading import build_engine
from tests.server.engine.traffic import SMALL
from tests.server.engine.virtual import Coming, World, arrivals

GROUP = 3


def world_of(wait: float, seconds: Iterator[float]) -> World:
    """Steps take ``seconds``, one after the other."""

    def scheduler(clock: Callable[[], float]) -> Scheduler:
        return Scheduler(BlockManager(400, 16), SchedulerLimits(40, 64), Alignment(GROUP, wait, clock))

    return World(scheduler, lambda _: next(seconds))


def ready_in(world: World) -> list[Sequence]:
    """Those who could decode now."""
    return [s for s in world.sequences if s.status is Status.RUNNING and not s.prefilling]


def always(seconds: float) -> Iterator[float]:
    while True:
        yield seconds


def left_out(plan: Plan, ready: list[Sequence]) -> list[Sequence]:
    taken = {chunk.sequence for chunk in plan.chunks}
    return [sequence for sequence in ready if sequence not in taken]


@given(
    arrivals(steps=12, prompt=24, n=4, most=9), st.sampled_from([0.0, 0.5, 3.0, 7.0, 1000.0]), st.integers(0, 2**32),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_nobody_is_held_beyond_the_bound_or_for_nothing(
    wanted: list[Coming], wait: float, seed: int, steady: bool
) -> None:
    rng = random.Random(seed)
    world = world_of(wait, (1.0 if steady else rng.uniform(0.0, 3.0) for _ in iter(int, 1)))
    coming = sorted(wanted)
    first_chance: dict[Sequence, float] = {}
    number = 0
    while coming or not world.scheduler.idle:
        world.add_due(coming, number)
        ready, began = ready_in(world), world.now
        for sequence in ready:
            first_chance.setdefault(sequence, began)
        if ready and rng.random() < 0.05:
            world.scheduler.finish(ready.pop(rng.randrange(len(ready))))
        positions = {sequence: sequence.computed for sequence in ready}
        plan = world.step()
        decoding = [chunk.sequence for chunk in plan.public if chunk.decodes]
        for sequence in left_out(plan, ready):
            assert not sequence.private
            assert sequence.output_length == 1, "who decodes is never stopped again"
            assert began < first_chance[sequence] + wait
            assert any(
                other.request.tenant == sequence.request.tenant
                and positions[other] < positions[sequence] < other.longest
                for other in decoding
            ), "somebody in this very step is on the way to its position"
            together = [s for s in ready if s.request is sequence.request]
            assert not set(together) & set(decoding), "sequences of a request stay together"
        number += 1
        # Without a wait everything is done after so many steps; with one, each request may add its way.
        assert number < 13 + sum(prompt + output for _, prompt, output, _, _, _ in wanted) * 3
    assert world.finished()


def expected_to_wait(world: World, wait: float, sequence: Sequence, since: float) -> bool:
    """The rule for a single request with one step a second, by looking at every group under way."""
    groups: dict[int, list[Sequence]] = {}
    for other in ready_in(world):
        if other is not sequence and not other.private and other.request.tenant == sequence.request.tenant:
            groups.setdefault(other.computed, []).append(other)
    target = len(sequence.prompt)

    def has_room(position: int) -> bool:
        members = [other for other in groups.get(position, ()) if other.longest > target]
        return bool(members) and len(members) % GROUP != 0

    if has_room(target):
        return False
    return any(
        has_room(position) and world.now + (target - position) <= since + wait
        for position in groups
        if position < target
    )


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(2, 30), st.booleans()), max_size=6),
    st.integers(1, 40),
    st.integers(0, 6),
    st.integers(0, 20),
)
@settings(max_examples=200, deadline=None)
def test_a_late_request_waits_exactly_as_long_as_the_rule_says(
    others: list[tuple[int, int, bool]], prompt: int, delay: int, wait: int
) -> None:
    world = world_of(float(wait), always(1.0))
    for length, output, private in others:
        world.add(length, output, private=private)
    while any(s.prefilling or s.output_length < 2 for s in world.sequences if s.status is not Status.FINISHED):
        world.step()
    for _ in range(delay):
        world.step()
    (late,) = world.add(prompt, 5)
    world.step()
    since = world.now
    while late.output_length == 1:
        waits = expected_to_wait(world, wait, late, since)
        ready = ready_in(world)
        assert (late in left_out(world.step(), ready)) == waits


def test_a_request_waits_and_then_decodes_at_the_same_position() -> None:
    world = world_of(20.0, always(1.0))
    (early,) = world.add(4, 30)
    for _ in range(3):
        world.step()
    (late,) = world.add(12, 10)
    while late.output_length < 2:
        plan = world.step()
    assert {chunk.start for chunk in plan.public} == {12}
    assert early.output_length == 12 - 4 + 2


def test_nobody_waits_when_alone_nor_for_a_private_request_nor_for_one_that_ends_before() -> None:
    for output, private in ((30, True), (4, False)):
        world = world_of(100.0, always(1.0))
        world.add(4, output, private=private)
        world.step()
        (late,) = world.add(12, 3)
        world.step()
        world.step()
        assert late.output_length == 2


def begin(world: World, *prompts: int, n: int = 1) -> list[list[Sequence]]:
    """Requests whose prompts are all computed by the next step, those of each."""
    added = [world.add(prompt, 40, n=n) for prompt in prompts]
    world.step()
    return added


def test_the_wait_counts_from_the_first_chance_whoever_is_waited_for() -> None:
    world = world_of(8.0, always(1.0))
    ((near,),) = begin(world, 10)
    world.step()
    ((far,),) = begin(world, near.computed + 1 - 3)
    ((late,),) = begin(world, near.computed + 1 + 6)
    assert (late.computed - near.computed, late.computed - far.computed) == (6, 9)
    for _ in range(3):
        world.step()
    assert late.output_length == 1
    world.scheduler.finish(near)
    # The other is as far below as the first was in the beginning: more than what is left of the wait.
    world.step()
    assert late.output_length == 2


def test_requests_wait_only_for_as_many_places_as_there_are() -> None:
    world = world_of(50.0, always(1.0))
    begin(world, 5, 5)
    world.step()
    ((one, two),) = begin(world, 15, n=2)
    world.step()
    assert one.output_length == two.output_length == 2, "a pair finds one place"
    world = world_of(50.0, always(1.0))
    begin(world, 5)
    world.step()
    (first,), (second,), (third,) = begin(world, 15, 15, 15)
    world.step()
    assert sorted(s.output_length for s in (first, second, third)) == [1, 1, 2], "the third finds none"


def test_who_begins_in_this_step_is_waited_for_too() -> None:
    world = world_of(50.0, always(1.0))
    (lower,), (upper,) = begin(world, 10, 12)
    world.step()
    assert (lower.output_length, upper.output_length) == (2, 1)
    for _ in range(2):
        plan = world.step()
    assert [chunk.start for chunk in plan.public] == [12, 12]


@pytest.mark.parametrize(("wait", "together"), [(0.0, False), (60_000.0, True)])
def test_the_setting_reaches_a_real_engine(wait: float, together: bool) -> None:
    model, fill = random_model(SMALL, dtype=torch.float32, device=torch.device("cpu"))
    chosen = read_settings({"max_align_wait": wait, "max_prompt_wait": 0, "max_groups": 8, "kernels": "plain"}, None)
    engine = build_engine(chosen, model, fill, None)
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    engine.add(EngineRequest("early", ((1, 2, 3),), sampling))
    for _ in range(3):
        engine.step()
    engine.add(EngineRequest("late", (tuple(range(1, 16)),), sampling))
    receipts = {}
    while not engine.idle:
        receipts |= {name: delta.receipt for name, delta in engine.step() if delta.receipt is not None}
    assert (receipts["late"].live_members > 1) == together
    assert (receipts["early"].live_members > 1) == together
