"""Weights in the order of x86's matrix tiles (AMX): what an instruction takes lies together, so that a product reads
memory in one run, needs no copy, and is as fast for one row as for hundreds.

``[.., K, N]`` in bfloat16 becomes ``[.., N / 32, K / 32, 2 tiles, 16 pairs of terms, 16 columns, 2 terms]``, in int8
``[.., N / 32, K / 64, 2 tiles, 16 quads of terms, 16 columns, 4 terms]``: the same numbers under the same shape. Only
the compiled kernels compute with that; plain forms put it back first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.memory import empty_in_large_pages

_COLUMNS = 32  # of two tiles of weights


def _terms(dtype: torch.dtype) -> int:
    """Of K, in a tile of weights of a type: 16 times what four bytes hold; other types are put as bfloat16 is."""
    return 64 if dtype is torch.int8 else 32


def fits(weight: Tensor) -> bool:
    """Whether a weight ``[.., K, N]`` can be put in tiles."""
    rows, columns = weight.shape[-2:]
    return weight.dtype is torch.bfloat16 and rows % _terms(weight.dtype) == columns % _COLUMNS == 0


def experts_fit(first: Tensor) -> bool:
    """Whether experts whose first matrices are ``first [E, D, S]`` can be put in tiles, and be worth it: their hidden
    units are filled up with such that weigh nothing, half as many as there are at most."""
    width, size = first.shape[-2:]
    terms = _terms(first.dtype)
    return first.dtype in (torch.bfloat16, torch.int8) and width % terms == 0 and 2 * (-size % terms) <= size


def to_tiles(weight: Tensor) -> Tensor:
    """A copy of ``weight [.., K, N]`` in tiles, of the same shape."""
    rows, columns = weight.shape[-2:]
    terms = _terms(weight.dtype)
    split = weight.reshape(*weight.shape[:-2], rows // terms, 16, terms // 16, columns // _COLUMNS, 2, 16)
    return _permuted(split, (3, 0, 4, 1, 5, 2)).reshape(weight.shape)  # of terms (step, word, place), of columns


def from_tiles(weight: Tensor) -> Tensor:
    """What ``to_tiles`` was given."""
    rows, columns = weight.shape[-2:]
    terms = _terms(weight.dtype)
    split = weight.reshape(*weight.shape[:-2], columns // _COLUMNS, rows // terms, 2, 16, 16, terms // 16)
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
    more = -first.shape[-1] % _terms(first.dtype)
    size, width = first.shape[-1] + more, first.shape[-2]
    common = empty_in_large_pages((first.shape[0], 2 * width * size), first.dtype)
    lin1, lin2 = torch.split(common, width * size, 1)
    lin1, lin2 = lin1.view(-1, width, size), lin2.view(-1, size, width)
    for expert in range(first.shape[0]):
        lin1[expert] = to_tiles(F.pad(first[expert], (0, more)))
        lin2[expert] = to_tiles(F.pad(second[expert], (0, 0, 0, more)))
    return lin1, lin2
