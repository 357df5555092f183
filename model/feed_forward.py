"""Feed-forward layers other than Mixture of Tokens: the dense one."""

from __future__ import annotations

from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import TORCH, Arithmetic, Projection
from model.mixing import ACTIVATION_FUNCTIONS


class DenseFeedForward(nn.Module):
    """GPT-2's ``activation(x c_fc) c_proj``, with biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Projection(config.n_embd, config.hidden_size)
        self.c_proj = Projection(config.hidden_size, config.n_embd)
        self.activation = ACTIVATION_FUNCTIONS[config.activation_function]

    def initialize(self, std: float, residual_std: float) -> None:
        self.c_fc.initialize(std)
        self.c_proj.initialize(residual_std)

    def forward(self, x: Tensor, arithmetic: Arithmetic = TORCH, onto: Tensor | None = None) -> Tensor:
        hidden = arithmetic.activate(arithmetic.affine(x, self.c_fc), self.activation)
        return arithmetic.affine(hidden, self.c_proj, onto)
