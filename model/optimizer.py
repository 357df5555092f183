"""Muon: momentum, orthogonalised, for weight matrices (Jordan et al. 2024; scaled as in Liu et al., arXiv 2502.16982).

``torch.optim.Muon`` takes two-dimensional parameters only; an expert bank is a stack of matrices, each of which must be
orthogonalised by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Newton-Schulz coefficients of Jordan et al.: steep at zero, so that few iterations suffice.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 4
_RMS = 0.2  # the update's root mean square, which makes AdamW's learning rates fit (Liu et al., section 2.2)


def orthogonalize(stack: Tensor) -> Tensor:
    """``[..., m, n]`` to the nearest semi-orthogonal matrices, approximately: singular values near 1."""
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised; parameters have two or more dimensions, of which the last two
    are a matrix and the others stack such matrices."""

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

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
                update = orthogonalize(parameter.grad.lerp(average, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * _RMS * max(parameter.shape[-2:]) ** 0.5)
