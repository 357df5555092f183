"""What a checkpoint becomes on this machine: types, experts in int8, and refusals that name the setting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.spread import save_curve
from model.transformer import Transformer
from server.config import read_settings
from server.engine.spread import ANNEALED
from server.loading import load, load_spread, quantize_experts, resolve_device, resolve_dtype, resolve_kernels

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
        assert bool((error <= bank.scale1[:, None] * 0.751).all()), "rounded to the nearest, or to the next"
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


def test_groups_are_weighed_by_what_distance_costs_the_checkpoint(tmp_path: Path) -> None:
    config = ModelConfig(temperature=0.1)
    assert load_spread(tmp_path, config) is ANNEALED
    save_curve([(0, 0.0), (2, 0.25)], tmp_path)
    found = load_spread(tmp_path, config)
    assert (found.of(1), found.of(2), found.of(99)) == (0.125, 0.25, 0.25)


def test_the_bundled_checkpoint_knows_what_distance_costs() -> None:
    engine = load(read_settings({"kv_cache_memory": "16MiB", "log_level": "error"}, None)).engine.direct
    assert engine.grouping.loss.name == "own"


@pytest.mark.parametrize(
    ("asked", "balance", "found"),
    [(None, 1, (192, 192)), (None, 40, (320, 192)), (None, 256, (512, 192)), (64, 40, (64, 64)), (999, 1, (999, 999))],
)
def test_prompt_tokens_a_step(
    asked: int | None, balance: int, found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many public ones as fill, in groups of 8, what the machine has room for while it reads the experts."""
    monkeypatch.setattr("server.loading.measure_balance", lambda *_, **__: balance)
    flags = {"log_level": "error"} if asked is None else {"log_level": "error", "prefill_tokens": asked}
    loaded = load(read_settings(flags, None))
    limits = loaded.engine.direct.scheduler.limits
    assert loaded.engine.info.group_size == 8
    assert (limits.prefill_tokens, limits.private_prefill_tokens) == found
