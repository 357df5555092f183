"""Integers only: groups, blocks, stop strings, and the sampler's row independence."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.native import Kernels
from model.tokenizer import Tokenizer
from server.engine.block_manager import BlockManager
from server.engine.detokenizer import Detokenizer
from server.engine.grouping import GroupingPolicy
from server.engine.plan import Chunk, Plan
from server.engine.request import EngineRequest, Privacy, SamplingParams, Sequence
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler, SchedulerLimits


def _chunk(position: int, arrival: int, tenant: str, *, decodes: bool, length: int = 1) -> Chunk:
    prompt = (1,) * (position if decodes else position + length)
    request = EngineRequest(f"r{arrival}", (prompt or (1,),), SamplingParams(max_tokens=300), tenant=tenant)
    return Chunk(Sequence(request, 0, arrival), position, length)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from("ab"), st.booleans(), st.integers(1, 3)), max_size=30),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 8)),
    st.integers(1, 6),
)
@settings(max_examples=100, deadline=None)
def test_groups_hold_every_row_once_and_keep_their_limits(
    rows: list[tuple[int, str, bool, int]], size: int, window: int | None, most: int
) -> None:
    chunks = [
        _chunk(position, number, tenant, decodes=decodes, length=1 if decodes else length)
        for number, (position, tenant, decodes, length) in enumerate(rows)
    ]
    owners = [(chunk, chunk.start + i) for chunk in chunks for i in range(chunk.length)]
    groups = GroupingPolicy(size, window, most).plan(Plan(public=tuple(chunks)))
    assert sorted(row for group in groups for row in group.rows) == list(range(len(owners)))
    for group in groups:
        members = [owners[row] for row in group.rows]
        positions = [position for _, position in members]
        assert 1 <= len(members) <= size
        assert len({chunk.sequence.request.tenant for chunk, _ in members}) == 1
        assert min(positions) <= group.position <= max(positions)
        if not all(chunk.decodes for chunk, _ in members):
            assert len(set(positions)) == 1
        if window is not None:
            assert max(positions) - min(positions) < window


def test_exact_positions_stay_apart_while_affordable_and_merge_nearest_first_beyond() -> None:
    chunks = tuple(_chunk(position, n, "", decodes=True) for n, position in enumerate((3, 10, 11, 30)))
    plan = Plan(public=chunks)
    assert len(GroupingPolicy(4, None, 4).plan(plan)) == 4
    assert [group.rows for group in GroupingPolicy(4, None, 3).plan(plan)] == [(0,), (1, 2), (3,)]
    assert [group.rows for group in GroupingPolicy(4, 1, 1).plan(plan)] == [(0,), (1,), (2,), (3,)]


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_blocks_are_never_lost_nor_held_twice(sizes: list[int], seed: int) -> None:
    manager, rng = BlockManager(20, 4), random.Random(seed)
    held: list[list[int]] = []
    for size in sizes:
        if manager.can_allocate(size):
            held.append(manager.allocate(size))
        if held and rng.random() < 0.6:
            manager.free(held.pop(rng.randrange(len(held))), dirty=rng.random() < 0.5)
        if rng.random() < 0.3:
            manager.take_dirty()
        manager.check_integrity()
        assert 0 not in {block for blocks in held for block in blocks}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["the cat sat on the mat, the end. " * 20]), 300)


@given(st.text(alphabet="abSTOP €🙂", max_size=40), st.lists(st.sampled_from(["STOP", "TO", "b€", "🙂"]), max_size=3))
@settings(max_examples=150, deadline=None)
def test_text_ends_before_the_first_stop_string(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(tokenizer, tuple(stops))
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped is not None:
            break
    pieces.append(detokenizer.finish())
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    said = "".join(pieces)
    assert all(stop not in said for stop in stops)
    assert "\ufffd" not in said
    if not places:
        assert said == text
    else:
        assert text.startswith(said) and detokenizer.stopped is not None


def test_a_sampled_row_does_not_depend_on_its_companions(kernels: Kernels | None) -> None:
    generator, sampler = torch.Generator().manual_seed(0), Sampler(None, kernels)
    variants = [
        SamplingParams(seed=1, logprobs=3),
        SamplingParams(seed=2, top_k=5, logprobs=0),
        SamplingParams(seed=3, top_p=0.7, min_p=0.02, frequency_penalty=0.5),
        SamplingParams(temperature=0, repetition_penalty=1.3, logit_bias={4: 5.0}, logprobs=20),
    ]
    logits = torch.randn(len(variants), 67, generator=generator) * 3

    def sample(chosen: list[int]) -> list[object]:
        chunks = []
        for i in chosen:
            sequence = Sequence(EngineRequest("r", ((1, 2, 3),), variants[i]), 0, 0)
            chunks.append(Chunk(sequence, 0, 3))
        return list(sampler.sample(logits[chosen], tuple(chunks)))

    together = sample([0, 1, 2, 3])
    assert together == [sample([i])[0] for i in range(4)]


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(seed=0, top_k=2), {5, 6}),
        (SamplingParams(seed=0, top_p=0.5), {6}),
        (SamplingParams(seed=0, min_p=0.3), {5, 6}),
        (SamplingParams(seed=0, temperature=0), {6}),
        (SamplingParams(seed=0, logit_bias={0: 100}), {0}),
        (SamplingParams(seed=0, top_k=1, min_tokens=1, stop_token_ids=(6,)), {5}),
    ],
)
def test_truncation_keeps_the_best(params: SamplingParams, allowed: set[int], kernels: Kernels | None) -> None:
    logits = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 5.0, 6.0]])
    sequence = Sequence(EngineRequest("r", ((1,),), params), 0, 0)
    drawn = {Sampler(None, kernels).sample(logits, (Chunk(sequence, 0, 1),))[0].token_id for _ in range(200)}
    assert drawn == allowed


def test_prompts_advance_together_only_with_those_they_mix_with() -> None:
    """Two of four equal prompts at a time: the first ones are done after half of the steps."""
    scheduler = Scheduler(BlockManager(50, 4), SchedulerLimits(8, prefill_tokens=16, cohort=2))
    for name in "abcd":
        scheduler.add(EngineRequest(name, ((1,) * 16,), SamplingParams(max_tokens=1)))
    steps = []
    for _ in range(4):
        plan = scheduler.schedule()
        steps.append([(c.sequence.request.request_id, c.start, c.length) for c in plan.public if not c.decodes])
        scheduler.advance(plan)
    assert steps == [
        [("a", 0, 8), ("b", 0, 8)], [("a", 8, 8), ("b", 8, 8)], [("c", 0, 8), ("d", 0, 8)], [("c", 8, 8), ("d", 8, 8)],
    ]  # fmt: skip


@pytest.mark.parametrize("first", ["private", "public"])
def test_private_prompts_take_at_most_their_share_of_a_step(first: str) -> None:
    """Whoever came first; what they leave is for public ones, but not the other way round."""
    limits = SchedulerLimits(8, prefill_tokens=256, private_prefill_tokens=64)
    scheduler = Scheduler(BlockManager(200, 4), limits)
    for name in (first, "public" if first == "private" else "private"):
        privacy = Privacy(1.0, 0.0) if name == "private" else None
        prompts = ((1,) * 200,) * 2 if name == "private" else ((1,) * 320,)
        scheduler.add(EngineRequest(name, prompts, SamplingParams(max_tokens=1), privacy=privacy))
    steps = []
    for _ in range(3):
        plan = scheduler.schedule()
        steps.append(tuple(sum(chunk.length for chunk in kind) for kind in (plan.private, plan.public)))
        scheduler.advance(plan)
    assert steps == ([(64, 192), (64, 128), (64, 1)] if first == "private" else [(0, 256), (64, 64), (64, 1)])
