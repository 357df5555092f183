"""What a checkpoint becomes on this machine: types, experts in int8, and refusals that name the setting."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from server.config import read_settings
from server.loading import load, quantize_experts, resolve_device, resolve_dtype, resolve_kernels

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("device", lambda: resolve_device("tpu")),
        ("dtype", lambda: resolve_dtype("float8", CPU)),
        ("kernels", lambda: resolve_kernels("fast", CPU)),
        ("kernels", lambda: resolve_kernels("native", torch.device("meta"))),
    ],
)
def test_unknown_names_are_refused(name: str, refused: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        refused()  # type: ignore[operator]


def test_the_bundled_checkpoint_in_int8() -> None:
    """A quarter of float32's bytes, and the receipts and fingerprints of an engine of its own."""
    whole = load(read_settings({"dtype": "float32", "log_level": "error"}, None))
    small = load(read_settings({"dtype": "float32", "quantize": "int8", "log_level": "error"}, None))
    assert (whole.engine.info.quantized, small.engine.info.quantized) == (None, "int8")
    assert whole.engine.info.parameters == small.engine.info.parameters
    for float_bank, bank in zip(
        whole.engine.direct.runner.model.banks, small.engine.direct.runner.model.banks, strict=True
    ):
        assert bank.lin1.dtype is bank.lin2.dtype is torch.int8 and bank.scale1 is not None
        error = (bank.lin1 * bank.scale1[:, None] - float_bank.lin1).abs()
        assert bool((error <= bank.scale1[:, None] * 0.501).all()), "rounded to the nearest"
        assert bool((bank.lin1.abs().amax(1) == 127).all()), "every channel uses the whole range"


def test_a_dense_model_has_nothing_to_quantize() -> None:
    config = ModelConfig(model_type="gpt2", vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(ValueError, match=r"^quantize: "):
        quantize_experts(Transformer(config))


def test_what_starting_imports() -> None:
    """torch's compiler takes seconds to import, and serving needs none of it."""
    found = subprocess.run(
        [sys.executable, "-c", "import sys, server.app, server.loading; print('torch._dynamo' in sys.modules)"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.strip() == "False"
