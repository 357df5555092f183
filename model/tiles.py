"""Weights in the order of x86's matrix tiles (AMX): what an instruction takes lies together, so that a product reads
memory in one run, needs no copy, and is as fast for one row as for hundreds.

``[.., K, N]`` in bfloat16 becomes ``[.., N / 32, K / 32, 2 tiles, 16 pairs of terms, 16 columns, 2 terms]``: the same
numbers under the same shape. Only the compiled kernels compute with that; plain forms put it back first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.memory import empty_in_large_pages

_TERMS = 32  # of K in a tile of weights, and columns of two tiles


def fits(*weights: Tensor) -> bool:
    """Whether weights ``[.., K, N]`` can be put in tiles."""
    return all(w.dtype is torch.bfloat16 and w.shape[-2] % _TERMS == w.shape[-1] % _TERMS == 0 for w in weights)


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
    first, so that the experts in order are one run of memory."""
    sizes = [first[0].numel(), second[0].numel()]
    common = empty_in_large_pages((first.shape[0], sum(sizes)), first.dtype)
    put = [part.view(-1, *w.shape[1:]) for part, w in zip(torch.split(common, sizes, 1), (first, second), strict=True)]
    for expert in range(first.shape[0]):
        put[0][expert], put[1][expert] = to_tiles(first[expert]), to_tiles(second[expert])
    return put[0], put[1]
