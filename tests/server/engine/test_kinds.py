"""Every kind of feed-forward layer in the paged engine: the trainer's own log probabilities, and private answers that
are the same alone and in traffic."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.groups import Fill
from model.native import Kernels
from server.engine.engine import Engine
from server.engine.grouping import GroupingPolicy
from server.engine.model_runner import ModelRunner
from server.engine.request import Delta, EngineRequest, Privacy, SamplingParams
from server.engine.scheduler import SchedulerLimits
from tests.model.kinds import KINDS, make, trainers_logits
from tests.server.engine.traffic import alone, answer, random_requests, run

# Widths that are multiples of nothing, where kernels have remainders.
_BASE = ModelConfig(
    vocab_size=101, n_positions=220, n_embd=33, n_layer=2, n_head=3, group_size=5, n_expert=7, expert_size=13
)
_ODD = {
    "dense": _BASE.replace(model_type="gpt2", n_inner=37),
    "switch": _BASE.replace(model_type="switch"),
    "top-k": _BASE.replace(model_type="top-k", n_shared_expert=1, experts_per_token=2),
    "top-k-normalized": _BASE.replace(
        model_type="top-k", n_expert=21, experts_per_token=6, n_shared_expert=2, expert_size=5, normalize_gates=True
    ),
    "expert-choice": _BASE.replace(model_type="expert-choice", temperature=0.0),
}


@pytest.mark.parametrize("prefill_tokens", [512, 9, 1])
@pytest.mark.parametrize(
    ("name", "private"),
    # A private token of a kind with groups is not in the group that the trainer would put it in.
    [(name, private) for name, config in KINDS.items() for private in (False, True) if not private * config.is_grouped],
)
def test_the_engine_computes_what_the_trainer_does(
    name: str, prefill_tokens: int, private: bool, way: dict[str, Any], drive_engine: Any
) -> None:
    """Prompts in chunks, then eight tokens one by one, in full groups where the kind has groups."""
    config = KINDS[name]
    model = make(config)
    fill = Fill.build("zeros", config, model.banks, None) if config.is_grouped else Fill("none", None)
    runner = ModelRunner(model, fill, blocks=80, block_size=4, **way)
    engine = Engine(runner, GroupingPolicy(config.group_size), SchedulerLimits(16, prefill_tokens), None, blocks=80)
    prompts = torch.randint(0, 61, (4, 11), generator=torch.Generator().manual_seed(3)).tolist()
    sampling = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=20, logprobs=20, ignore_eos=True)
    privacy = Privacy(config.temperature, 0.0) if private else None
    request = EngineRequest("a", tuple(map(tuple, prompts)), sampling, privacy=privacy)
    deltas: list[Delta] = drive_engine(engine, [request])["a"]
    said = [[t for d in deltas if d.sequence_index == row for t in d.token_ids] for row in range(4)]
    assert [len(tokens) for tokens in said] == [8] * 4
    wanted = trainers_logits(model, torch.tensor([p + tokens for p, tokens in zip(prompts, said, strict=True)]))
    for row in range(4):
        mine = [delta for delta in deltas if delta.sequence_index == row]
        entries = [*(mine[0].prompt_logprobs or ())[1:], *(entry for delta in mine for entry in delta.logprobs)]
        assert len(entries) == 18
        for position, found in enumerate(entries):
            assert found is not None and len(found.top) == 20
            for token, value in (*found.top, (found.token_id, found.logprob)):
                assert abs(value - wanted[row, position, token].item()) < 1e-4


def _requests(config: ModelConfig, rng: random.Random) -> list[EngineRequest]:
    """Random traffic, no private temperature above the model's."""
    return [
        request
        if request.privacy is None
        else dataclasses.replace(
            request, privacy=Privacy(min(request.privacy.temperature, config.temperature), request.privacy.skip_below)
        )
        for request in random_requests(config, rng, 60)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", _ODD)
def test_private_answers_are_the_same_alone_and_in_traffic(
    name: str, dtype: torch.dtype, kernels: Kernels | None, build_engine: Any
) -> None:
    """To the last bit, through random schedules with shared beginnings, swaps and requests that go away."""
    config, rng = _ODD[name], random.Random(1)
    requests = _requests(config, rng)
    # About seven long sequences fit at once: the others wait, or others make room for them.
    room: dict[str, int] = {"prefill_tokens": 64, "blocks": 100, "max_running": 12, "swap_blocks": 200}
    outcome = run(build_engine(config, dtype, kernels=kernels, **room), requests, rng)
    lonely = build_engine(config, dtype, kernels=kernels)
    compared = 0
    for request in requests:
        if request.privacy is not None and request.request_id not in outcome.aborted:
            assert answer(alone(lonely, request)) == answer(outcome.news[request.request_id])
            compared += 1
    assert compared > 8 and outcome.prefix_hits and outcome.swaps


@pytest.mark.parametrize("name", ["switch", "top-k"])
def test_public_answers_of_token_choice_do_not_depend_on_companions(
    name: str, kernels: Kernels | None, build_engine: Any, drive_engine: Any
) -> None:
    """Were tokens dropped beyond a capacity, a crowd of equal ones would push the last of them out."""
    first = EngineRequest("a", ((1, 2, 3),), SamplingParams(max_tokens=4, temperature=0, logprobs=3))
    same = [
        EngineRequest(f"b{n}", ((1, 2, 3),) * 8, SamplingParams(max_tokens=4, temperature=0, logprobs=3))
        for n in range(3)
    ]
    alone = drive_engine(build_engine(_ODD[name], kernels=kernels), [first])["a"]
    crowded = drive_engine(build_engine(_ODD[name], kernels=kernels), [*same, first])["a"]
    assert [d.token_ids for d in alone] == [d.token_ids for d in crowded]
    for one, two in zip(alone, crowded, strict=True):
        assert one.logprobs[0].logprob == pytest.approx(two.logprobs[0].logprob, abs=1e-4)
    assert alone[-1].receipt is not None and alone[-1].receipt.group_fill == "none"


def test_public_answers_of_expert_choice_depend_on_companions(build_engine: Any, drive_engine: Any) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=0, logprobs=1)
    answers = []
    for other in ((1, 2, 3), (4, 5, 6)):
        request = EngineRequest("a", ((1, 2, 3), other), sampling)
        deltas = drive_engine(build_engine(_ODD["expert-choice"]), [request])["a"]
        answers.append([d.logprobs for d in deltas if d.sequence_index == 0])
        assert deltas[-1].receipt is not None and deltas[-1].receipt.live_members == 2
    assert answers[0] != answers[1]
