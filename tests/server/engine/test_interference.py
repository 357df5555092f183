"""Nothing that the engine does lets a private request see, or be seen by, anyone else."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.native import Kernels
from server.engine.native_pass import NativePass
from server.engine.request import Delta, EngineRequest, SamplingParams
from tests.server.engine.traffic import SMALL, Outcome, alone, answer, random_requests, run


def _crowded(build_engine: Any, dtype: torch.dtype, kernels: Kernels | None, rng: random.Random) -> Any:
    """An engine that is soon full: blocks and places run out, requests wait and are swapped out."""
    return build_engine(
        SMALL,
        dtype,
        kernels=kernels,
        prefill_tokens=rng.choice([16, 64, 200]),
        blocks=rng.choice([100, 130, 200]),
        max_running=rng.choice([6, 12, 24]),
        swap_blocks=rng.choice([60, 1000, 1000]),
    )


def _compare(outcome: Outcome, requests: list[EngineRequest], lonely: Any) -> int:
    """Number of private sequences whose answers were compared with those of ``lonely`` engine."""
    compared = 0
    for request in requests:
        if request.privacy is None or request.request_id in outcome.aborted:
            continue
        expected = answer(alone(lonely, request))
        assert answer(outcome.news[request.request_id]) == expected, request.request_id
        compared += len(request.prompts) * request.n
    return compared


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_thousand_private_answers(dtype: torch.dtype, kernels: Kernels | None, build_engine: Any) -> None:
    """Over both dtypes and both ways to compute; 500 and more in each."""
    compared = hits = swaps = seed = 0
    lonely = build_engine(SMALL, dtype, kernels=kernels)
    while compared < 510:
        rng = random.Random(seed)
        seed += 1
        requests = random_requests(SMALL, rng, 120)
        outcome = run(_crowded(build_engine, dtype, kernels, rng), requests, rng)
        compared += _compare(outcome, requests, lonely)
        hits += outcome.prefix_hits
        swaps += outcome.swaps
    assert hits > 10 and swaps > 10, "the schedules are too tame to show anything"


def test_private_answers_are_functions_of_their_requests(
    kernels: Kernels | None, build_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: Counter[str] = Counter()
    for name in ("_whole", "_by_parts"):
        monkeypatch.setattr(NativePass, name, _counted(taken, name))

    @given(st.integers(0, 2**32))
    @settings(max_examples=6, deadline=None)
    def check(seed: int) -> None:
        rng = random.Random(seed)
        requests = random_requests(SMALL, rng, 24)
        dtype = rng.choice([torch.float32, torch.bfloat16])
        outcome = run(_crowded(build_engine, dtype, kernels, rng), requests, rng)
        _compare(outcome, requests, build_engine(SMALL, dtype, kernels=kernels))

    check()
    assert kernels is None or min(taken["_whole"], taken["_by_parts"]) > 20, "both ways lead to the same bits"


def _counted(taken: Counter[str], name: str) -> Callable[..., Any]:
    way = getattr(NativePass, name)

    def counted(*given_: Any) -> Any:
        taken[name] += 1
        return way(*given_)

    return counted


def _other_contents(requests: list[EngineRequest], rng: random.Random) -> list[EngineRequest]:
    """The private ones ask something else of the same length, decode and sample otherwise."""
    return [
        dataclasses.replace(
            request,
            prompts=tuple(tuple(rng.randrange(SMALL.vocab_size) for _ in prompt) for prompt in request.prompts),
            sampling=dataclasses.replace(request.sampling, temperature=1.3, seed=rng.randrange(1000)),
        )
        if request.privacy is not None
        else request
        for request in requests
    ]


def _without_hits(requests: list[EngineRequest]) -> list[EngineRequest]:
    """Equal lengths whatever is said: no end of text, nothing found in the prefix cache."""
    return [
        dataclasses.replace(
            request,
            sampling=dataclasses.replace(request.sampling, ignore_eos=True),
            cache_salt=request.request_id if request.privacy is not None else None,
            n=1,
            prompts=request.prompts[:1],
        )
        for request in requests
    ]


def _compare_public(build_engine: Any, kernels: Kernels | None, seed: int, count: int) -> int:
    """Number of public requests that answered alike beside private ones of different contents."""
    rng = random.Random(seed)
    requests = _without_hits(random_requests(SMALL, rng, count))
    changed = _other_contents(requests, rng)
    before, after = (
        run(_crowded(build_engine, torch.float32, kernels, random.Random(seed)), asked, random.Random(seed))
        for asked in (requests, changed)
    )
    assert before.aborted == after.aborted
    public = [request.request_id for request in requests if request.privacy is None]
    for request_id in public:
        assert answer(before.news[request_id]) == answer(after.news[request_id])
    return len(public)


def test_public_answers_do_not_depend_on_private_contents(kernels: Kernels | None, build_engine: Any) -> None:
    @given(st.integers(0, 2**32))
    @settings(max_examples=6, deadline=None)
    def check(seed: int) -> None:
        _compare_public(build_engine, kernels, seed, 30)

    check()


@pytest.mark.slow
def test_five_hundred_public_answers_do_not_depend_on_private_contents(
    kernels: Kernels | None, build_engine: Any
) -> None:
    compared = seed = 0
    while compared < 500:
        compared += _compare_public(build_engine, kernels, seed, 120)
        seed += 1


def test_what_was_swapped_out_goes_on_where_it_was(kernels: Kernels | None, build_engine: Any) -> None:
    """Each public request has a tenant, and so its groups, of its own: its answer may not change when it makes room,
    but for the last bits, which depend on how many public rows run beside it."""
    rng = random.Random(5)
    sampling = SamplingParams(max_tokens=20, temperature=0, logprobs=2, ignore_eos=True)
    requests = [
        EngineRequest(f"r{n}", (tuple(rng.randrange(97) for _ in range(40 + n)),), sampling, tenant=f"t{n}", priority=1)
        for n in range(6)
    ]
    urgent = EngineRequest("urgent", ((5,) * 190,), sampling)

    def told(interrupt: bool) -> tuple[dict[str, list[Delta]], int]:
        engine = build_engine(SMALL, kernels=kernels, blocks=32, swap_blocks=50, prefill_tokens=2000)
        news: dict[str, list[Delta]] = {}
        for request in requests:
            engine.add(request)
        most = 0
        for step in range(60):
            if step == 4 and interrupt:
                engine.add(urgent)
            for request_id, delta in engine.step():
                news.setdefault(request_id, []).append(delta)
            most = max(most, engine.scheduler._swapped_blocks)
            engine.scheduler.check_integrity()
        assert engine.idle
        return news, most

    quiet, none = told(interrupt=False)
    broken, some = told(interrupt=True)
    assert none == 0 and some > 4 and "urgent" in broken
    for request in requests:
        before, after = quiet[request.request_id], broken[request.request_id]
        assert [d.token_ids for d in before] == [d.token_ids for d in after]
        for one, other in zip(before, after, strict=True):
            assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-5)
