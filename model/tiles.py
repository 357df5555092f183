"""Weights in the order of x86's matrix tiles (AMX): what an instruction takes lies together, so that a product reads
memory in one run, needs no copy, and is as fast for one row as for hundreds.

``[.., K, N]`` in bfloat16 becomes ``[.., N / 32, K / 32, 2 tiles, 16 pairs of terms, 16 columns, 2 terms]``: the same
numbers under the same shape. Only the compiled kernels compute with that; plain forms put it back first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.memory import empty_in_large_pages

_TERMS = 32  # of K in a tile of weights, and columns of two tiles


def fits(weight: Tensor) -> bool:
    """Whether a weight ``[.., K, N]`` can be put in tiles."""
    return weight.dtype is torch.bfloat16 and weight.shape[-2] % _TERMS == weight.shape[-1] % _TERMS == 0


def experts_fit(first: Tensor) -> bool:
    """Whether experts whose first matrices are ``first [E, D, S]`` can be put in tiles, and be worth it: their hidden
    units are filled up with such that weigh nothing, half as many as there are at most."""
    width, size = first.shape[-2:]
    return first.dtype is torch.bfloat16 and width % _TERMS == 0 and 2 * (-size % _TERMS) <= size


def to_tiles(weight: Tensor) -> Tensor:
    """A copy of ``weight [.., K, N]`` in tiles, of the same shape."""
    rows, columns = weight.shape[-2:]
    split = weight.reshape(*weight.shape[:-2], rows // _TERMS, 16, 2, columns // _TERMS, 2, 16)
    return _permuted(split, (3, 0, 4, 1, 5, 2)).reshape(weight.shape)  # of terms (step, pair, half), of columns


def from_tiles(weight: Tensor) -> Tensor:
    """What ``to_tiles`` was given."""
    rows, columns = weight.shape[-2:]
    split = weight.reshape(*weight.shape[:-2], columns // _TERMS, rows // _TERMS, 2, 16, 16, 2)
    return _permuted(split, (1, 3, 5, 0, 2, 4)).reshape(weight.shape)


def _permuted(tensor: Tensor, last: tuple[int, ...]) -> Tensor:
    """By the order of the last dimensions."""
    first = tensor.dim() - len(last)
    return tensor.permute(*range(first), *(first + place for place in last))


@torch.no_grad()
def put_in_tiles(weight: Tensor) -> None:
    """In place."""
    weight.copy_(to_tiles(weight))


@torch.no_grad()
def side_by_side(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """``first [E, D, S]`` and ``second [E, S, D]`` in tiles, on common memory: an expert's second matrix follows its
    first, so that the experts in order are one run of memory. ``S`` is filled up, with zeros, to whole tiles."""
    more = -first.shape[-1] % _TERMS
    size, width = first.shape[-1] + more, first.shape[-2]
    common = empty_in_large_pages((first.shape[0], 2 * width * size), first.dtype)
    lin1, lin2 = torch.split(common, width * size, 1)
    lin1, lin2 = lin1.view(-1, width, size), lin2.view(-1, size, width)
    for expert in range(first.shape[0]):
        lin1[expert] = to_tiles(F.pad(first[expert], (0, more)))
        lin2[expert] = to_tiles(F.pad(second[expert], (0, 0, 0, more)))
    return lin1, lin2
