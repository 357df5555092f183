"""Who finds whose prompt beginnings, and what becomes of the blocks."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.native import Kernels
from server.engine.block_manager import BlockManager
from server.engine.engine import Engine
from server.engine.prefix_cache import PrefixCache
from server.engine.request import EngineRequest, MixingPart, Privacy, SamplingParams
from tests.server.engine.traffic import SMALL, alone, answer

RNG = random.Random(9)
PROMPT = tuple(RNG.randrange(SMALL.vocab_size) for _ in range(200))
SAMPLING = SamplingParams(max_tokens=3, temperature=0, logprobs=2)
FIRST = EngineRequest("first", (PROMPT,), SAMPLING, privacy=Privacy(0.3, 0.01), tenant="a", cache_salt="s")


def _answered(engine: Engine, request: EngineRequest) -> tuple[list[str], int]:
    """The answer, and how many prompt tokens were computed for it."""
    engine.check(request)
    engine.add(request)
    news, computed = [], 0
    while not engine.idle:
        news += [delta for _, delta in engine.step()]
        computed += engine.last_step.prefill_tokens
        engine.scheduler.check_integrity()
    return answer(news), computed


def _again(**changes: Any) -> EngineRequest:
    return dataclasses.replace(FIRST, **{"request_id": "again", **changes})


HITS = {
    "same": (_again(), 192),
    "other ending": (_again(prompts=((*PROMPT[:150], 1, 2, 3),)), 128),
    "other middle": (_again(prompts=((*PROMPT[:100], 1, *PROMPT[101:]),)), 64),
    "whole units only": (_again(prompts=(PROMPT[:128],)), 64),  # the last token's logits are wanted
    "other sampling": (_again(sampling=dataclasses.replace(SAMPLING, temperature=1.0, seed=3)), 192),
    "other beginning": (_again(prompts=((1, *PROMPT[1:]),)), 0),
    "other salt": (_again(cache_salt="t"), 0),
    "no salt": (_again(cache_salt=None), 0),
    "other tenant": (_again(tenant="b"), 0),
    "other temperature": (_again(privacy=Privacy(0.2, 0.01)), 0),
    "other threshold": (_again(privacy=Privacy(0.3, 0.02)), 0),
    "public": (_again(privacy=None, cache_salt=None), 0),
    "prompt scores": (_again(sampling=dataclasses.replace(SAMPLING, prompt_logprobs=1)), 0),
}


@pytest.mark.parametrize("kind", HITS)
def test_what_is_found(kind: str, build_engine: Any, kernels: Kernels | None) -> None:
    request, found = HITS[kind]
    engine = build_engine(SMALL, kernels=kernels)
    _, computed = _answered(engine, FIRST)
    assert computed == len(PROMPT)
    got, computed = _answered(engine, request)
    assert computed == len(request.prompts[0]) - found
    if request.privacy is not None:  # a hit is not to be told from a miss
        assert got == answer(alone(build_engine(SMALL, kernels=kernels), request))


@pytest.mark.parametrize(("tenant", "salt", "found"), [("", None, 0), ("", "s", 192), ("a", None, 192)])
def test_everybody_shares_nothing_without_a_salt(tenant: str, salt: str | None, found: int, build_engine: Any) -> None:
    engine = build_engine(SMALL)
    for expected in (0, found):
        _, computed = _answered(engine, _again(tenant=tenant, cache_salt=salt))
        assert computed == len(PROMPT) - expected


def test_siblings_share_while_they_run(build_engine: Any) -> None:
    """Three requests at once: whoever is admitted after a unit is computed finds it."""
    engine = build_engine(SMALL, prefill_tokens=64)
    for number in range(3):
        engine.add(_again(request_id=f"r{number}", sampling=dataclasses.replace(SAMPLING, max_tokens=10)))
        engine.step()
        engine.step()
        engine.scheduler.check_integrity()
    tables = [sequences[0].block_table for sequences in engine._sequences.values()]
    assert tables[0][:4] == tables[1][:4] == tables[2][:4]
    assert len({block for table in tables for block in table[12:]}) == 3 * len(tables[0][12:])
    while not engine.idle:
        engine.step()
        engine.scheduler.check_integrity()


def test_what_is_kept_makes_room_and_is_zeroed_first(build_engine: Any) -> None:
    engine = build_engine(SMALL, blocks=16)  # 13 for the request
    _answered(engine, FIRST)
    scheduler, cache = engine.scheduler, engine.runner.cache
    assert scheduler.prefixes.idle_blocks == scheduler.blocks.used == 12
    kept = scheduler.prefixes.all_blocks()
    assert not any(cache.holds_only_zeros(block) for block in kept)
    public = EngineRequest("public", ((4,) * 100,), SamplingParams(max_tokens=100), tenant="a")
    engine.add(public)
    engine.step()
    (sequence,) = engine._sequences["public"]
    reused = set(kept) & set(sequence.block_table)
    assert reused
    fresh = set(sequence.block_table[scheduler.blocks.blocks_for(sequence.computed) :])
    assert all(cache.holds_only_zeros(block) for block in reused & fresh)
    assert scheduler.prefixes.idle_blocks < 12
    scheduler.check_integrity()


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(BlockManager(20, 16), 64)
    keys = [cache.keys(dataclasses.replace(FIRST, cache_salt=salt), PROMPT[:65])[0] for salt in "abc"]
    for key in keys:
        assert cache.offer(key, tuple(cache._blocks.allocate(64)), MixingPart(64, 64.0, 0.0, 0.0))
        cache.release([key])
    cache.release(cache.take(keys[:1]))  # used again
    cache.reclaim(4)
    assert [bool(cache.take([key])) for key in keys] == [True, False, True]


@given(st.lists(st.tuples(st.sampled_from(["use", "leave", "reclaim"]), st.integers(0, 7), st.integers(1, 9))))
@settings(max_examples=200, deadline=None)
def test_the_cache_against_a_plain_model(operations: list[tuple[str, int, int]]) -> None:
    """The model: a dictionary of users a unit. Units are never lost while used; idle ones add up."""
    blocks = BlockManager(100, 16)
    cache = PrefixCache(blocks, 64)
    prompts = [(n % 2, *PROMPT[: 64 * (1 + n // 2)]) for n in range(8)]
    users: dict[bytes, int] = {}
    running: list[list[bytes]] = []
    for operation, number, count in operations:
        if operation == "use":
            keys = cache.keys(FIRST, prompts[number])
            taken = cache.take(keys)
            assert taken == keys[: len(taken)]
            assert len(taken) == len(keys) or keys[len(taken)] not in users
            for key in keys[len(taken) :]:
                held = blocks.allocate(64)
                new = cache.offer(key, tuple(held), MixingPart(64, 64.0, 0.0, 0.0))
                assert new == (key not in users)
                if not new:
                    blocks.free(held, dirty=True)
                    break
                taken.append(key)
            for key in taken:
                users[key] = users.get(key, 0) + 1
            running.append(taken)
        elif operation == "leave" and running:
            left = running.pop(number % len(running))
            cache.release(left)
            for key in left:
                users[key] -= 1
        else:
            before = cache.idle_blocks
            cache.reclaim(count)
            assert before - cache.idle_blocks >= min(count, before)
            users = {key: count for key, count in users.items() if key in cache._units}
        blocks.take_dirty()
        assert cache.idle_blocks == 4 * sum(count == 0 for count in users.values())
        assert sorted(cache.all_blocks()) == sorted(blocks._held)
        assert {key: unit.users for key, unit in cache._units.items()} == users
        blocks.check_integrity()
