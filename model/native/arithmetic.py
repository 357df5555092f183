"""The products, norms and activations of a pass through the decoder, by the compiled kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Projection
from model.mixing import Activation
from model.native import Kernels


class NativeArithmetic:
    """``layers.Arithmetic`` by the kernels: a row's bits depend on that row alone. Without gradients. The first
    ``shared`` rows need no such promise: torch multiplies them where they are so many that it is faster.

    Activations are float32 between products, whatever the weights are: that is what the kernels compute in, and
    rounding them to bfloat16 cost the bundled checkpoint 1.4 % of its perplexity."""

    dtype: torch.dtype | None = torch.float32

    def __init__(self, kernels: Kernels, *, shared: int = 0) -> None:
        self._kernels, self._shared = kernels, shared

    def affine(self, x: Tensor, projection: Projection, onto: Tensor | None = None) -> Tensor:
        weight, bias, shared = projection.weight, projection.bias, self._shared
        if projection.in_tiles or self._kernels.prefers_rows(shared, weight):
            return self._kernels.linear(x, weight, bias, in_tiles=projection.in_tiles, onto=onto)
        together = torch.addmm(bias, x[:shared].to(weight.dtype), weight).float()
        if shared < x.shape[0]:
            together = torch.cat((together, self._kernels.linear(x[shared:], weight, bias)))
        return together if onto is None else onto + together

    def normalize(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return self._kernels.normalize(x, norm)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return self._kernels.activate(x.contiguous(), activation)

    def head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        shared = self._shared
        if self._kernels.dots_in_tiles(weight) or self._kernels.prefers_rows(shared, weight):
            return self._kernels.linear(hidden, weight, None, by_output=True)
        rest = self._kernels.linear(hidden[shared:], weight, None, by_output=True)
        return torch.cat((F.linear(hidden[:shared].to(weight.dtype), weight).float(), rest))
