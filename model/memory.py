"""Host memory in large pages, where the system has them: reading it takes a fraction of the address translations, which
is a tenth of the time of reading weights and more with few threads. Knows nothing of models."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

_LARGE_PAGE = 2**21
_WORTH_IT = 2 * _LARGE_PAGE  # bytes: less holds few whole pages
_MADV_HUGEPAGE = 14  # linux/mman.h


def empty_in_large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Contiguous and not yet filled, in host memory; what is large begins at a large page. Where those are not to be
    had it is in ordinary ones."""
    size = math.prod(shape) * dtype.itemsize
    if size < _WORTH_IT:
        return torch.empty(shape, dtype=dtype)
    whole = torch.empty(size + _LARGE_PAGE, dtype=torch.uint8)  # what is never touched takes no memory
    begin = -whole.data_ptr() % _LARGE_PAGE
    tensor = whole[begin : begin + size].view(dtype).view(shape)
    advise = _advise()
    if advise is not None:
        advise(tensor.data_ptr(), size // _LARGE_PAGE * _LARGE_PAGE, _MADV_HUGEPAGE)  # advice: failing changes nothing
    return tensor


def in_large_pages(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a tensor of any device, in another type if asked for."""
    return empty_in_large_pages(tuple(tensor.shape), dtype or tensor.dtype).copy_(tensor)


class Workspace:
    """Memory that results of the same kind take one after the other: of large ones, the first touch of new memory costs
    as much as computing them. A result is gone when the next of its kind is taken."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        """Contiguous float32, not filled."""
        size = math.prod(shape)
        if kind not in self._held or self._held[kind].numel() < size:
            self._held[kind] = empty_in_large_pages((size,), torch.float32)
        return self._held[kind][:size].view(shape)


def move_to_large_pages(model: nn.Module, dtype: torch.dtype) -> None:
    """All parameters, one after the other, so that there are never two copies of all of them. For inference."""
    for parameter in model.parameters():
        parameter.data = in_large_pages(parameter.data, dtype)


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    """The system's ``madvise``, if it has one."""
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return found
