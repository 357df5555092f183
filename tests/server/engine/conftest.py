"""Small engines with a reference crowd, driven step by step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.groups import Fill
from model.native import Kernels, NativeUnavailable, open_kernels
from model.reference import ReferenceCrowd
from model.transformer import Transformer
from server.engine.engine import Engine
from server.engine.grouping import GroupingPolicy
from server.engine.model_runner import ModelRunner
from server.engine.request import Delta, EngineRequest
from server.engine.scheduler import SchedulerLimits
from server.loading import quantize_experts

BuildEngine = Callable[..., Engine]


def build(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    *,
    prefill_tokens: int = 128,
    kernels: Kernels | None = None,
    blocks: int = 1500,
    max_running: int = 64,
    swap_blocks: int = 0,
    quantize: bool = False,
    seed: int = 0,
    fixed: bool | None = None,
    device: str = "cpu",
) -> Engine:
    """Weights large enough that mixing, experts and attention all matter."""
    limits = SchedulerLimits(max_running, prefill_tokens, swap_blocks)
    model = Transformer(config)
    model.initialize(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model = model.to(device, dtype).eval().requires_grad_(False)
    if quantize:
        quantize_experts(model)
    if not config.is_mot:
        return _engine(model, Fill("none", None), limits, kernels, blocks, fixed)
    generator = torch.Generator().manual_seed(1)
    shape = (config.n_layer, config.n_positions, config.group_size, config.n_embd)
    activations = torch.randn(shape, generator=generator).to(device, dtype)
    crowd = ReferenceCrowd(activations, model.banks, fingerprint="test")
    fill = Fill.build("reference", config, model.banks, crowd)
    return _engine(model, fill, limits, kernels, blocks, fixed)


def _engine(
    model: Transformer,
    fill: Fill,
    limits: SchedulerLimits,
    kernels: Kernels | None,
    blocks: int,
    fixed: bool | None = None,
) -> Engine:
    runner = ModelRunner(model, fill, blocks=blocks, block_size=16, kernels=kernels, fixed=fixed)
    return Engine(runner, GroupingPolicy(model.config.group_size), limits, None, blocks=blocks)


def drive(engine: Engine, requests: list[EngineRequest], rng: random.Random | None = None) -> dict[str, list[Delta]]:
    """Everything that each request was told; with ``rng`` requests arrive a few at a time while others run."""
    news: dict[str, list[Delta]] = {request.request_id: [] for request in requests}
    waiting = list(requests)
    while waiting or not engine.idle:
        for _ in range(min(len(waiting), rng.randint(0, 6) if rng else len(waiting))):
            request = waiting.pop(0)
            engine.check(request)
            engine.add(request)
        for request_id, delta in engine.step():
            news[request_id].append(delta)
        engine.scheduler.check_integrity()
    return news


@pytest.fixture
def build_engine() -> BuildEngine:
    return build


@pytest.fixture
def drive_engine() -> Callable[..., dict[str, list[Delta]]]:
    return drive


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels | None:
    """Both ways to compute on a CPU; the native one wherever there is a compiler. Of its steps, those with longer
    public prompts go part by part, the others in one pass."""
    monkeypatch.setattr("server.engine.native_pass._SHORT", 40)
    return None if request.param == "plain" else _native()


@pytest.fixture(params=["plain", "native", "fixed"])
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    """All ways to compute, a GPU's fixed shapes among them, as the runner is told of them."""
    return {"kernels": _native() if request.param == "native" else None, "fixed": request.param == "fixed"}


def _native() -> Kernels:
    try:
        return open_kernels()
    except NativeUnavailable as error:
        pytest.skip(str(error))
