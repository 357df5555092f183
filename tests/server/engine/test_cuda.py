"""The engine on a CUDA device: golden logits, recorded passes against the plain path, and the promise. Skipped where
there is none."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.config import ModelConfig
from server.config import Settings
from server.engine.engine import Engine
from server.engine.request import EngineRequest, SamplingParams
from server.loading import load
from tests.server.engine.conftest import build, drive
from tests.server.engine.test_private import ODD
from tests.server.engine.traffic import CONFIGS, SMALL, alone, answer, given_requests, random_requests, run, scores

pytestmark = pytest.mark.cuda
GOLDEN = sorted(path for path in (Path(__file__).parents[2] / "golden").iterdir() if path.is_dir())


def _open(**settings: object) -> Engine:
    return load(Settings(device="cuda", kv_cache_memory=2**28, **settings)).engine.direct  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden_logits(folder: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = _open(model=folder, group_fill="zeros", dtype="float32")
    expected = load_file(folder / "expected.safetensors")
    for case in ("full_groups", "padded_group", "single"):
        ids = expected[f"{case}.input_ids"]
        wanted = torch.log_softmax(expected[f"{case}.logits"].float(), -1)
        sampling = SamplingParams(max_tokens=0, prompt_logprobs=5)
        request = EngineRequest(case, tuple(map(tuple, ids.tolist())), sampling)
        for delta in drive(engine, [request])[case]:
            for place, entry in enumerate(delta.prompt_logprobs or ()):
                for token, value in entry.top if entry is not None else ():
                    assert abs(value - wanted[delta.sequence_index, place - 1, token].item()) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_passes_against_the_plain_path(name: str) -> None:
    config = CONFIGS[name]
    requests = given_requests(config, 24)
    plain = drive(build(config, device="cuda", fixed=False), requests, random.Random(1))
    fixed = drive(build(config, device="cuda"), requests, random.Random(1))
    for request in requests:
        ours, theirs = (scores(news[request.request_id]) for news in (plain, fixed))
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_private_among_others(dtype: str) -> None:
    engine, lonely = _open(dtype=dtype), _open(dtype=dtype)
    _compare(engine, lonely, random_requests(engine.config, random.Random(4), 60))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [SMALL, ODD, SMALL.replace(use_discrete_routing=True), CONFIGS["dense"], CONFIGS["top-k"]],
    ids=["small", "odd", "discrete", "dense", "top-k"],
)
def test_private_among_others_in_other_shapes(config: ModelConfig, dtype: torch.dtype) -> None:
    engine, lonely = (build(config, dtype, device="cuda") for _ in range(2))
    _compare(engine, lonely, random_requests(config, random.Random(6), 40))


def _compare(engine: Engine, lonely: Engine, requests: list[EngineRequest]) -> None:
    """To the last bit, what private requests get in traffic and alone."""
    rng = random.Random(4)
    outcome = run(engine, requests, rng)
    compared = 0
    for request in requests:
        if request.privacy is not None and request.request_id not in outcome.aborted:
            assert answer(outcome.news[request.request_id]) == answer(alone(lonely, request))
            compared += 1
    assert compared > 5
