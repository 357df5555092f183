"""The affine map in GPT-2's layout, its row-independent form, and how a pass through the decoder multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import tiles

# Rows of private requests run in tiles of this many rows: inside a tile of constant shape a row's bits depend
# neither on its neighbours nor on its place (measured: F.linear and bmm, float32 and bfloat16).
TILE = 8


class Projection(nn.Module):
    """``x @ weight + bias`` with ``weight [in, out]``: GPT-2 calls it Conv1D. ``put_in_tiles`` turns the weight to the
    order that compiled kernels may want."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.in_tiles = False

    def initialize(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, tiles.from_tiles(self.weight) if self.in_tiles else self.weight)

    def put_in_tiles(self) -> None:
        """In place, where it fits. Not to be trained afterwards."""
        if not self.in_tiles and tiles.fits(self.weight):
            tiles.put_in_tiles(self.weight)
            self.in_tiles = True

    def put_in_order(self) -> None:
        """Undo ``put_in_tiles``."""
        if self.in_tiles:
            self.weight.data = tiles.from_tiles(self.weight.data)
            self.in_tiles = False


class Arithmetic(Protocol):
    """The operations of one pass, apart from attention and mixing. Results have the type of ``x``, but for the head's.
    ``dtype`` is the type of what passes from layer to layer; None: that of the weights."""

    dtype: torch.dtype | None

    def normalize(self, x: Tensor, norm: nn.LayerNorm) -> Tensor: ...

    def affine(self, x: Tensor, projection: Projection, onto: Tensor | None = None) -> Tensor:
        """``x [n, in]`` to ``[n, out]``, added to ``onto [n, out]``."""

    def activate(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor: ...

    def head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """``hidden [n, D]`` and ``weight [V, D]`` to ``[n, V]``."""


class TorchArithmetic:
    """Torch's own, with gradients: a row's last bits may depend on how many rows there are."""

    dtype: torch.dtype | None = None

    def normalize(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        result: Tensor = norm(x)
        return result

    def affine(self, x: Tensor, projection: Projection, onto: Tensor | None = None) -> Tensor:
        result: Tensor = projection(x)
        return result if onto is None else onto + result

    def activate(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        return activation(x)

    def head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)


TORCH = TorchArithmetic()


class WideArithmetic(TorchArithmetic):
    """Torch's with float32 between products, whatever the weights are: rounding activations to bfloat16 cost the
    bundled checkpoint 1.4 % of its perplexity."""

    dtype: torch.dtype | None = torch.float32

    def normalize(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)

    def affine(self, x: Tensor, projection: Projection, onto: Tensor | None = None) -> Tensor:
        result: Tensor = projection(x.to(projection.weight.dtype)).float()
        return result if onto is None else onto + result

    def head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden.to(weight.dtype), weight).float()


# Below this many columns a matrix product's kernel may treat a row by its place among the others (measured: float32,
# 5 to 11 columns); wider products do not.
_NARROW = 16


def tile_matmul(tile: Tensor, weight: Tensor) -> Tensor:
    """``tile [rows, in] @ weight [in, out]`` whose rows do not depend on their place, however few the columns."""
    columns = weight.shape[1]
    if columns >= _NARROW:
        return tile @ weight
    padding = weight.new_zeros(weight.shape[0], _NARROW - columns)
    return (tile @ torch.cat((weight, padding), 1))[:, :columns].contiguous()


_VECTOR = 64  # elements; a multiple of every vector width, so that an elementwise kernel has no scalar remainder
_SERIAL = 32768  # elements; below this torch runs an elementwise kernel in one piece


def activate_rows(activation: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """``activation`` so that a row's bits do not depend on its place: vector kernels treat the last few elements of
    their input, and those at a border between threads, by other code, whose last bit may differ."""
    if hidden.numel() % _VECTOR == 0 and hidden.numel() < _SERIAL:
        return activation(hidden)
    return torch.stack([activation(row) for row in hidden.unbind(0)])


class TiledArithmetic(TorchArithmetic):
    """Torch's for private rows in a shape that is constant or their request's own: a row's bits do not depend on its
    place either."""

    def activate(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        return activate_rows(activation, x)
