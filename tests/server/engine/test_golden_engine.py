"""The paged engine gives the golden logits: prompts in chunks, and token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import load_model
from model.groups import Fill
from server.engine.engine import Engine
from server.engine.grouping import GroupingPolicy
from server.engine.model_runner import ModelRunner
from server.engine.request import EngineRequest, SamplingParams
from server.engine.scheduler import SchedulerLimits

GOLDEN = sorted(path for path in (Path(__file__).parents[2] / "golden").iterdir() if path.is_dir())


@pytest.mark.parametrize("prefill_tokens", [512, 9, 1])
@pytest.mark.parametrize("case", ["full_groups", "padded_group", "single"])
@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_prompt_logprobs(folder: Path, case: str, prefill_tokens: int, way: dict[str, Any], drive_engine: Any) -> None:
    model = load_model(folder)
    expected = load_file(folder / "expected.safetensors")
    ids = expected[f"{case}.input_ids"]
    wanted = torch.log_softmax(expected[f"{case}.logits"], -1)
    fill = Fill.build("zeros", model.config, model.banks, None)
    runner = ModelRunner(model, fill, blocks=60, block_size=4, **way)
    policy = GroupingPolicy(model.config.group_size)
    engine = Engine(runner, policy, SchedulerLimits(16, prefill_tokens), None, blocks=60)
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=20)
    request = EngineRequest("golden", tuple(tuple(row) for row in ids.tolist()), sampling)
    deltas = drive_engine(engine, [request])["golden"]
    assert len(deltas) == ids.shape[0]
    for delta in deltas:
        assert delta.prompt_logprobs is not None and delta.prompt_logprobs[0] is None
        assert len(delta.prompt_logprobs) == ids.shape[1]
        for position, found in enumerate(delta.prompt_logprobs[1:]):
            assert found is not None
            for token, value in (*found.top, (found.token_id, found.logprob)):
                assert abs(value - wanted[delta.sequence_index, position, token].item()) < 1e-4
