"""Random schedules: requests of every kind that come, wait, are pushed aside, go away, and share beginnings."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from model.config import ModelConfig
from server.engine.engine import Engine
from server.engine.request import Delta, EngineRequest, Privacy, SamplingParams, Status

SMALL = ModelConfig(
    vocab_size=97, n_positions=220, n_embd=32, n_layer=2, n_head=4, group_size=4, n_expert=8, expert_size=32
)
CONFIGS = {
    "mot": SMALL,
    "over-experts": SMALL.replace(emit_softmax_over_experts=True),
    "discrete": SMALL.replace(use_discrete_routing=True),
    "dense": ModelConfig(model_type="gpt2", vocab_size=97, n_positions=220, n_embd=32, n_layer=2, n_head=4),
    "expert-choice": SMALL.replace(model_type="expert-choice", temperature=0.0),
    "switch": SMALL.replace(model_type="switch"),
    "top-k": SMALL.replace(model_type="top-k", n_shared_expert=1, experts_per_token=2),
}


@dataclass
class Outcome:
    """What a run told each request, in order, and which of the engine's doings it came through."""

    news: dict[str, list[Delta]]
    aborted: set[str]
    prefix_hits: int = 0  # steps in which some beginning was found
    swaps: int = 0


def random_requests(config: ModelConfig, rng: random.Random, count: int) -> list[EngineRequest]:
    """Half of them private. Prompts begin alike now and then, so that prefixes are found."""
    beginnings = [tuple(rng.randrange(config.vocab_size) for _ in range(150)) for _ in range(2)]
    # So few ways to ask privately that beginnings meet again.
    ways = [
        (Privacy(rng.choice([config.temperature, 0.3, 0.0]), rng.choice([0.0, 0.05])), tenant, salt)
        for tenant, salt in (("a", None), ("a", "one"), ("", None))
    ]
    requests = []
    for number in range(count):
        length = rng.choice([1, 8, 9, 64, 65, 130, 140, 190, rng.randint(1, 200)])
        common = rng.choice(beginnings)[: rng.choice([0, 70, 140, 140])][:length]
        tail = [
            tuple(rng.randrange(config.vocab_size) for _ in range(length - len(common)))
            for _ in range(rng.choice([1, 1, 1, 3]))
        ]
        sampling = SamplingParams(
            max_tokens=rng.randint(0, 12),
            temperature=rng.choice([0.0, 0.8]),
            seed=number,
            logprobs=3,
            prompt_logprobs=rng.choice([None, None, 2]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 10]),
        )
        way = rng.choice(ways) if rng.random() < 0.5 else None
        privacy, tenant, salt = way or (None, rng.choice(["", "a", "b"]), None)
        requests.append(
            EngineRequest(
                f"r{number}",
                tuple(common + rest for rest in tail),
                sampling,
                n=rng.choice([1, 1, 1, 2]),
                privacy=privacy,
                tenant=tenant,
                cache_salt=salt,
                priority=rng.choice([0, 0, 1, 2]),
            )
        )
    return requests


def run(engine: Engine, requests: list[EngineRequest], rng: random.Random) -> Outcome:
    """Requests arrive a few at a time; now and then one goes away. What happens when depends on ``rng`` and on the
    course of the engine, never on what requests say."""
    outcome = Outcome({request.request_id: [] for request in requests}, set())
    waiting = list(requests)
    swapped: set[int] = set()
    while waiting or not engine.idle:
        for _ in range(min(len(waiting), rng.randint(0, 5))):
            request = waiting.pop(0)
            engine.check(request)
            engine.add(request)
        under_way = sorted(engine._sequences)
        if under_way and rng.random() < 0.04:
            victim = rng.choice(under_way)
            engine.abort(victim)
            outcome.aborted.add(victim)
        for request_id, delta in engine.step():
            outcome.news[request_id].append(delta)
        engine.scheduler.check_integrity()
        outcome.prefix_hits += engine.last_step.reused_tokens > 0
        for sequences in engine._sequences.values():
            swapped.update(sequence.arrival for sequence in sequences if sequence.status is Status.SWAPPED)
    outcome.swaps = len(swapped)
    return outcome


def alone(engine: Engine, request: EngineRequest) -> list[Delta]:
    """The request's answer on an idle engine, with nothing of others to find: no tenant, no salt."""
    engine.add(dataclasses.replace(request, tenant="", cache_salt=None))
    news = []
    while not engine.idle:
        news += [delta for _, delta in engine.step()]
    return news


def answer(deltas: list[Delta]) -> list[str]:
    """Every bit of an answer, sequence by sequence: repr of a float tells them all."""
    return [repr(delta) for delta in sorted(deltas, key=lambda delta: delta.sequence_index)]


def given_requests(config: ModelConfig, count: int) -> list[EngineRequest]:
    """Given tokens, so that two ways of computing cannot part at a near tie: prompts, and one token more."""
    rng = random.Random(5)
    requests = []
    for number in range(count):
        prompt = tuple(rng.randrange(config.vocab_size) for _ in range(rng.choice([1, 7, 16, 63, 64, 65, 150, 219])))
        temperature = rng.choice([config.temperature, config.temperature / 3, 0.0])
        privacy = Privacy(temperature, rng.choice([0.0, 0.02])) if rng.random() < 0.5 else None
        bias = {rng.randrange(config.vocab_size): 100.0}
        sampling = SamplingParams(
            max_tokens=min(4, config.n_positions - len(prompt)), temperature=0, logit_bias=bias,
            logprobs=97, prompt_logprobs=97,
        )  # fmt: skip
        requests.append(EngineRequest(str(number), (prompt,), sampling, n=rng.choice([1, 2]), privacy=privacy))
    return requests


def scores(deltas: list[Delta]) -> list[float]:
    return [
        value
        for delta in deltas
        for entry in (*(delta.prompt_logprobs or ()), *delta.logprobs)
        for _, value in sorted(entry.top if entry is not None else ())
    ]
