"""bfloat16 at low temperatures: rounding a score before it is divided by T would cost a third of the bits."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from model.attention import attend_whole_sequences
from model.config import ModelConfig
from model.groups import Fill, PrivateRows, SharedGroups
from model.layers import TORCH, Arithmetic
from model.mixing import ExpertBank, WholeSequences, mix_groups
from model.native import Kernels, NativeUnavailable, open_kernels
from model.native.arithmetic import NativeArithmetic
from model.reference import ReferenceCrowd
from model.transformer import Transformer

CONFIG = ModelConfig(n_embd=64, n_head=4, n_layer=1, n_positions=4, n_expert=32, expert_size=16, group_size=8)
COLD = 0.02


def _bank() -> ExpertBank:
    """Weights that bfloat16 holds exactly, and scores of some tens, as trained controllers give."""
    torch.manual_seed(0)
    bank = ExpertBank(CONFIG).requires_grad_(False)
    bank.initialize(1.0, 0.1)
    return bank.to(torch.bfloat16).float()


def _members(count: int) -> Tensor:
    return torch.randn(count, CONFIG.group_size, CONFIG.n_embd, generator=torch.Generator().manual_seed(1)).bfloat16()


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("autocast", [False, True])
def test_mixing(autocast: bool) -> None:
    bank, members = _bank(), _members(40)
    wanted = mix_groups(bank, members.float(), COLD)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            found = mix_groups(bank, members.float(), COLD)
    else:
        found = mix_groups(bank.bfloat16(), members, COLD)
    assert _distance(found, wanted) < 0.01


def _kernels(name: str) -> Kernels | None:
    if name == "native":
        with contextlib.suppress(NativeUnavailable):
            return open_kernels()
        pytest.skip("no compiler here")
    return None


@pytest.mark.parametrize("name", ["plain", "native"])
@pytest.mark.parametrize("temperature", [COLD, 0.0])
def test_private_rows(name: str, temperature: float) -> None:
    bank, crowd, x = _bank(), _members(4), _members(1)[0]

    def run(bank: ExpertBank, x: Tensor, crowd: Tensor, kernels: Kernels | None) -> Tensor:
        rows = PrivateRows(
            CONFIG, Fill("reference", ReferenceCrowd(crowd[None], [bank], fingerprint=None)),
            positions=torch.arange(8) % 4, temperatures=torch.full((8,), temperature), skip_below=torch.zeros(8),
            live=torch.ones(8, dtype=torch.bool), kernels=kernels,
        )  # fmt: skip
        return rows(0, bank, x)

    wanted = run(bank, x.float(), crowd.float(), None)
    assert wanted.any()
    assert _distance(run(bank.bfloat16(), x, crowd, _kernels(name)), wanted) < 0.01


@pytest.mark.parametrize("name", ["plain", "native"])
def test_shared_groups(name: str) -> None:
    bank, crowd, x = _bank(), _members(4), _members(2).flatten(0, 1)[:10]

    def run(bank: ExpertBank, x: Tensor, crowd: Tensor, kernels: Kernels | None) -> Tensor:
        config = CONFIG.replace(temperature=COLD)
        groups = SharedGroups(
            config, Fill("reference", ReferenceCrowd(crowd[None], [bank], fingerprint=None)),
            rows=torch.arange(10), places=torch.tensor([0, 1, 2, 3, 4, 8, 9, 16, 24, 25]),
            positions=torch.arange(4), largest=5, kernels=kernels,
        )  # fmt: skip
        return groups(0, bank, x)

    wanted = run(bank, x.float(), crowd.float(), None)
    assert _distance(run(bank.bfloat16(), x, crowd, _kernels(name)), wanted) < 0.01


def test_residuals_are_float32_with_kernels() -> None:
    """Weights that bfloat16 holds exactly give float32's hidden states, up to what products round."""
    config = CONFIG.replace(n_layer=3, vocab_size=50, temperature=0.1)
    model = Transformer(config).requires_grad_(False)
    model.initialize(0)
    for block in model.blocks:
        block.mlp.initialize(0.02, 0.01)  # small beside the residual, so that its rounding is what counts
    model.bfloat16()
    ids, positions = torch.arange(24) % 50, torch.arange(4).repeat(6)

    def hidden(model: Transformer, arithmetic: Arithmetic) -> Tensor:
        return model(
            ids, positions, lambda _, qkv: attend_whole_sequences(qkv, 6, config.n_head),
            WholeSequences(config, 6), arithmetic,
        )  # fmt: skip

    kernels = _kernels("native")
    assert kernels is not None
    found = hidden(model, NativeArithmetic(kernels))
    rounded = hidden(model, TORCH)
    wanted = hidden(model.float(), TORCH)
    assert found.dtype is torch.float32 and rounded.dtype is torch.bfloat16
    assert _distance(found, wanted) < _distance(rounded, wanted) / 2
