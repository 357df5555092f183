"""The golden checkpoints: logits of the authors' own layer inside Hugging Face's GPT-2, through the plain forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.attention import attend_whole_sequences
from model.checkpoint import load_model
from model.mixing import WholeSequences

GOLDEN = Path(__file__).parent.parent / "golden"
CHECKPOINTS = ["mot-tiny", "mot-tiny-discrete", "mot-tiny-emit-over-experts", "mot-tiny-relu", "mot-tiny-temperature"]


@pytest.mark.parametrize("case", ["full_groups", "padded_group", "single"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_agree(name: str, case: str) -> None:
    model = load_model(GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    ids, logits = expected[f"{case}.input_ids"], expected[f"{case}.logits"]
    batch, length = ids.shape
    hidden = model(
        ids.flatten(),
        torch.arange(length).repeat(batch),
        lambda layer, qkv: attend_whole_sequences(qkv, batch, model.config.n_head),
        WholeSequences(model.config, batch),
    )
    actual = model.logits(hidden).view(batch, length, -1)
    torch.testing.assert_close(actual, logits, atol=1e-4, rtol=0)
