"""A private request's tokens and log probabilities are, bit for bit, its own."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.native import Kernels
from server.engine.request import Delta, EngineRequest, Privacy, SamplingParams

SMALL = ModelConfig(
    vocab_size=97, n_positions=220, n_embd=32, n_layer=2, n_head=4, group_size=4, n_expert=8, expert_size=16
)
# Widths that are multiples of nothing, where kernels have remainders.
ODD = ModelConfig(
    vocab_size=101, n_positions=220, n_embd=33, n_layer=2, n_head=3, group_size=5, n_expert=7, expert_size=13
)


def _requests(config: ModelConfig, seed: int, count: int) -> list[EngineRequest]:
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        length = rng.choice([1, 2, 7, 8, 9, 63, 64, 65, rng.randint(1, 200)])
        prompts = rng.choice([1, 1, 2])
        sampling = SamplingParams(
            max_tokens=rng.randint(1, 8),
            temperature=rng.choice([0.0, 0.8]),
            seed=number,
            logprobs=5,
            prompt_logprobs=rng.choice([None, 3]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 10]),
        )
        privacy = Privacy(rng.choice([config.temperature, 0.3, 0.05, 0.0]), rng.choice([0.0, 0.01, 0.05]))
        requests.append(
            EngineRequest(
                f"{seed}-{number}",
                tuple(tuple(rng.randrange(config.vocab_size) for _ in range(length)) for _ in range(prompts)),
                sampling,
                n=rng.choice([1, 1, 2]),
                privacy=privacy if rng.random() < 0.5 else None,
            )
        )
    return requests


def _answer(deltas: list[Delta]) -> list[str]:
    """All that is promised of an answer, exactly: repr of a float tells every bit."""
    return sorted(repr((d.sequence_index, d.token_ids, d.logprobs, d.prompt_logprobs, d.finish_reason)) for d in deltas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        ODD,
        ODD.replace(emit_softmax_over_experts=True, n_expert=3, expert_size=5),
        SMALL.replace(use_discrete_routing=True),
        ModelConfig(model_type="gpt2", vocab_size=97, n_positions=220, n_embd=32, n_layer=2, n_head=4),
    ],
    ids=["small", "odd", "over-experts", "discrete", "dense"],
)
def test_private_answers_are_the_same_alone_and_in_traffic(
    config: ModelConfig, dtype: torch.dtype, kernels: Kernels | None, build_engine: Any, drive_engine: Any
) -> None:
    requests = _requests(config, seed=7, count=24)
    crowded = drive_engine(build_engine(config, dtype, kernels=kernels), requests, random.Random(3))
    private = [request for request in requests if request.privacy is not None]
    assert len(private) > 5
    for request in private:
        alone = drive_engine(build_engine(config, dtype, kernels=kernels), [request])
        assert _answer(alone[request.request_id]) == _answer(crowded[request.request_id])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_private_answers_with_experts_in_int8(
    dtype: torch.dtype, kernels: Kernels | None, build_engine: Any, drive_engine: Any
) -> None:
    requests = _requests(SMALL, 8, 24)
    crowded = drive_engine(build_engine(SMALL, dtype, kernels=kernels, quantize=True), requests, random.Random(3))
    whole = drive_engine(build_engine(SMALL, dtype, kernels=kernels), requests, random.Random(3))
    private = [request for request in requests if request.privacy is not None]
    for request in private:
        alone = drive_engine(build_engine(SMALL, dtype, kernels=kernels, quantize=True), [request])
        assert _answer(alone[request.request_id]) == _answer(crowded[request.request_id])
    assert any(_answer(crowded[r.request_id]) != _answer(whole[r.request_id]) for r in private), "nothing was rounded"


def test_public_answers_do_not_depend_on_private_contents(
    kernels: Kernels | None, build_engine: Any, drive_engine: Any
) -> None:
    requests = [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, ignore_eos=True))
        for request in _requests(SMALL, seed=11, count=24)
    ]
    changed = [
        dataclasses.replace(
            request, prompts=tuple(tuple((token + 1) % SMALL.vocab_size for token in p) for p in request.prompts)
        )
        if request.privacy is not None
        else request
        for request in requests
    ]
    before = drive_engine(build_engine(SMALL, kernels=kernels), requests, random.Random(5))
    after = drive_engine(build_engine(SMALL, kernels=kernels), changed, random.Random(5))
    for request in requests:
        same = _answer(before[request.request_id]) == _answer(after[request.request_id])
        assert same == (request.privacy is None)


def test_public_answers_depend_on_companions(build_engine: Any, drive_engine: Any) -> None:
    """The other tests would pass if nothing ever mixed."""
    sampling = SamplingParams(max_tokens=4, temperature=0, logprobs=1)
    first = EngineRequest("a", ((1, 2, 3),) * 2, sampling)
    second = dataclasses.replace(first, prompts=((1, 2, 3), (4, 5, 6)))
    answers = [drive_engine(build_engine(SMALL), [request])["a"] for request in (first, second)]
    mine = [[d.logprobs for d in deltas if d.sequence_index == 0] for deltas in answers]
    assert mine[0] != mine[1]
    assert all(d.receipt.live_members == 2 for d in answers[0] if d.receipt is not None)


def test_blocks_of_private_requests_are_zeroed_before_reuse(build_engine: Any, drive_engine: Any) -> None:
    engine = build_engine(SMALL)
    request = EngineRequest("a", ((1, 2, 3),), SamplingParams(max_tokens=2), privacy=Privacy(1.0, 0.0))
    engine.add(request)
    engine.step()
    (sequence,) = engine._sequences["a"]
    (block,) = sequence.block_table
    assert not engine.runner.cache.holds_only_zeros(block)
    engine.abort("a")
    engine.add(EngineRequest("b", ((4,),), SamplingParams(max_tokens=2)))
    engine.step()
    (successor,) = engine._sequences["b"]
    assert successor.block_table == [block], "the one freed last comes first"
    content = engine.runner.cache.copy_out([block])[:, :, 0]  # [layers, 2, block_size, heads, head_size]
    assert bool(content[:, :, 0].any()) and not bool(content[:, :, 1:].any()), "only what the public request wrote"
