"""Optimizers: Muon, and who gets which rate and decay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.optimizer import Muon, orthogonalize, set_rates
from tests.model.runs import make_trainer


def test_muon_steps_by_nearly_orthogonal_matrices() -> None:
    parameter = torch.nn.Parameter(torch.zeros(6, 10))
    parameter.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    Muon([parameter], lr=0.1, weight_decay=0.0).step()
    singular = torch.linalg.svdvals(parameter.detach())
    assert singular.max() / singular.min() < 2  # of the gradient itself it is much more
    assert torch.linalg.svdvals(parameter.grad).max() / torch.linalg.svdvals(parameter.grad).min() > 2


def _iterated(matrix: torch.Tensor) -> torch.Tensor:
    """One matrix, as the equation stands."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    for _ in range(4):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 5, 9), (2, 3, 9, 5)])
def test_orthogonalized_by_the_equation(shape: tuple[int, ...]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = orthogonalize(stack)
    assert found.shape == stack.shape
    flat = stack.reshape(-1, *shape[-2:])
    expected = torch.stack([_iterated(x) if shape[-2] <= shape[-1] else _iterated(x.T).T for x in flat])
    torch.testing.assert_close(found.reshape(flat.shape), expected)
    rounded = orthogonalize(stack.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - found).norm() < 0.03 * found.norm()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_its_rate_and_decay(optimizer: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, optimizer=optimizer, weight_decay=0.3, matrix_rate=2.0, temperature_mode="learnable",
        temperature_rate=5.0,
    )  # fmt: skip
    set_rates(trainer.optimizers, 0.01, trainer.settings)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for one in trainer.optimizers
        for group in one.param_groups
        for parameter in group["params"]
    }
    named = dict(trainer.model.named_parameters())
    matrix_rate = 0.02 if optimizer == "muon" else 0.01
    for name in ("h.0.mlp.lin1", "h.1.attn.c_proj.weight"):
        assert found.pop(id(named[name])) == (pytest.approx(matrix_rate), 0.3)
    for name in ("h.0.mlp.controller", "wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.1.attn.c_attn.bias"):
        assert found.pop(id(named[name])) == (pytest.approx(0.01), 0.0)
    factors = trainer.temperatures.log_factors
    assert found.pop(id(factors)) == (pytest.approx(0.05), 0.0)
    assert len(found) == len(named) - 7
