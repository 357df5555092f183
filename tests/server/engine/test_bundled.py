"""The promise on the bundled checkpoint: alone, among forty others of any kind, and after a restart."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from server.config import Settings
from server.engine.engine import Engine
from server.engine.request import EngineRequest, Privacy, SamplingParams
from server.loading import load
from tests.server.engine.traffic import alone, answer, run


def _open(dtype: str) -> Engine:
    return load(Settings(dtype=dtype, kv_cache_memory=2**28)).engine.direct


def _requests(engine: Engine, rng: random.Random, count: int) -> list[EngineRequest]:
    """Prompts of 1 to 200 tokens, greedy and sampled, with and without echo, T from the checkpoint's to 0."""
    vocabulary, highest = engine.config.vocab_size, engine.config.temperature
    requests = []
    for number in range(count):
        length = rng.choice([1, 2, 8, 63, 64, 65, 200, rng.randint(1, 200)])
        temperature = rng.choice([highest, highest / 2, rng.random() * highest, 0.0])
        requests.append(
            EngineRequest(
                f"r{number}",
                (tuple(rng.randrange(vocabulary) for _ in range(length)),),
                SamplingParams(
                    max_tokens=rng.randint(1, 6),
                    temperature=rng.choice([0.0, 0.9]),
                    seed=number,
                    logprobs=20,
                    prompt_logprobs=rng.choice([None, 20]),
                ),
                n=rng.choice([1, 1, 2]),
                privacy=Privacy(temperature, rng.choice([0.0, 0.01])) if number % 2 else None,
                tenant=rng.choice(["", "a"]),
            )
        )
    return requests


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_private_among_forty_others(dtype: str) -> None:
    """With the kernels that this machine serves with; both ways are compared on smaller models."""
    engine, restarted = _open(dtype), _open(dtype)
    rng = random.Random(dtype)
    requests = _requests(engine, rng, 48)
    outcome = run(engine, requests, rng)
    compared = 0
    for request in requests:
        if request.privacy is not None and request.request_id not in outcome.aborted:
            assert answer(outcome.news[request.request_id]) == answer(alone(restarted, request))
            compared += 1
    assert compared >= 15


def test_the_bundled_checkpoint_stays_within_its_size() -> None:
    from server.loading import DEMO

    sizes = {path.name: path.stat().st_size for path in Path(DEMO).iterdir()}
    assert sizes["model.safetensors"] < 24.5e6
    assert {"config.json", "tokenizer.json", "reference.safetensors", "private.json", "MODEL_CARD.md"} <= set(sizes)
