"""The engine on a CUDA device: the plain path's twin there, and the promise. Skipped where there is none."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from server.config import Settings
from server.engine.engine import Engine
from server.engine.request import EngineRequest, SamplingParams
from server.loading import load
from tests.server.engine.conftest import drive
from tests.server.engine.traffic import alone, answer, random_requests, run

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
                    assert abs(value - wanted[delta.index, place - 1, token].item()) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_private_among_others(dtype: str) -> None:
    engine, lonely = _open(dtype=dtype), _open(dtype=dtype)
    rng = random.Random(4)
    requests = random_requests(engine.config, rng, 60)
    outcome = run(engine, requests, rng)
    compared = 0
    for request in requests:
        if request.privacy is not None and request.request_id not in outcome.aborted:
            assert answer(outcome.news[request.request_id]) == answer(alone(lonely, request))
            compared += 1
    assert compared > 15
