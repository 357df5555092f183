"""Optimizers of a run, among them Muon: momentum, orthogonalised, for weight matrices (Jordan et al. 2024; scaled as in
Liu et al., arXiv 2502.16982).

``torch.optim.Muon`` takes two-dimensional parameters only; an expert bank is a stack of matrices, each of which must be
orthogonalised by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from model.recipe import TrainSettings

# Newton-Schulz coefficients of Jordan et al.: steep at zero, so that few iterations suffice.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 4
_RMS = 0.2  # the update's root mean square, which makes AdamW's learning rates fit (Liu et al., section 2.2)


def orthogonalize(stack: Tensor) -> Tensor:
    """``[..., m, n]`` to the nearest semi-orthogonal matrices, approximately: singular values near 1. With x of norm 1,
    ``x <- a x + (b x x' + c (x x')^2) x`` some times, in the type of ``stack``: bfloat16 is exact enough."""
    x = stack.reshape(-1, *stack.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if tall else x).reshape(stack.shape)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised, in ``dtype``; parameters have two or more dimensions, of which
    the last two are a matrix and the others stack such matrices."""

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average: Tensor = state["momentum"]
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(average, group["momentum"]).to(self._dtype))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * _RMS * max(parameter.shape[-2:]) ** 0.5)


def build_optimizers(
    model: nn.Module, temperatures: list[nn.Parameter], settings: TrainSettings
) -> list[torch.optim.Optimizer]:
    """Weight decay on matrices only: not on norms, biases, embeddings, learnt temperatures or controllers (whose scale
    is the temperature's business)."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.startswith(("wte", "wpe", "lm_head"))
        (matrices if is_matrix and not name.endswith("controller") else rest).append(parameter)
    decay = settings.weight_decay
    undecayed = [{"params": rest, "weight_decay": 0.0}]
    if temperatures:  # last, where ``set_rates`` looks for them
        undecayed.append({"params": temperatures, "weight_decay": 0.0})
    if settings.optimizer == "muon":
        return [
            Muon(
                matrices,
                lr=settings.learning_rate,
                weight_decay=decay,
                dtype=torch.bfloat16 if settings.autocast else torch.float32,
            ),
            torch.optim.AdamW(undecayed, betas=(0.9, 0.95)),
        ]
    return [torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, *undecayed], betas=(0.9, 0.95))]


def set_rates(optimizers: list[torch.optim.Optimizer], rate: float, settings: TrainSettings) -> None:
    """The step's learning rate, in each group at its own scale."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * (settings.matrix_rate if isinstance(optimizer, Muon) else 1.0)
    if settings.temperature_mode == "learnable":
        optimizers[-1].param_groups[-1]["lr"] = rate * settings.temperature_rate
