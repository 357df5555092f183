"""What passes to the compiled library and how: numbers that stand for kinds and types, structures, addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.memory import Workspace
from model.mixing import ACTIVATION_FUNCTIONS, Activation, ExpertBank
from model.native.compiler import NativeUnavailable

_KINDS = {
    ACTIVATION_FUNCTIONS["gelu"]: 0,
    ACTIVATION_FUNCTIONS["gelu_new"]: 1,
    F.relu: 2,
    F.silu: 3,
}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # of experts, as experts.h numbers them
TILES = 4  # added where experts are in tiles
BY_INPUT, BY_OUTPUT, IN_TILES = range(3)  # as linear.h numbers them


class PrivateLayer(ctypes.Structure):
    """Mirrors ``PrivateLayer`` in private_layer.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "D", "E", "S", "places", "members", "rivals")),
        *((name, ctypes.c_int32) for name in ("activation", "over_experts", "discrete", "gated", "weights", "half")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x", "own", "crowd", "crowd_scores", "positions", "temperatures", "skip_below", "live", "lin1", "lin2",
                "scale1", "scale2", "out", "entropy", "used",
            )
        ),
        *((name, ctypes.c_int64) for name in ("groups", "experts_apart", "groups_apart")),
        *((name, ctypes.c_void_p) for name in ("mixes", "outputs", "answers", "mixed")),
    ]  # fmt: skip


def activation_kind(activation: Activation) -> int:
    """The kernels' number of an activation. Raises NativeUnavailable for one that they lack."""
    if activation not in _KINDS:
        raise NativeUnavailable("the kernels lack this activation")
    return _KINDS[activation]


def function(library: ctypes.CDLL, name: str, arguments: Sequence[object], result: object = None) -> Callable[..., Any]:
    """One of the library's. Raises AttributeError."""
    found = getattr(library, name)
    found.argtypes, found.restype = arguments, result
    return found  # type: ignore[no-any-return]


def alike(mixes: Tensor, workspace: Workspace | None) -> tuple[Tensor, Tensor]:
    """``mixes [E, n, D]`` in float32, rows or groups one after the other, and room for as much in the same order."""
    experts, groups, width = mixes.shape
    by_group = mixes.stride() == (width, experts * width, 1)
    mixes = mixes.float() if by_group or mixes.is_contiguous() else mixes.float().contiguous()
    shape = (groups, experts, width) if by_group else (experts, groups, width)
    room = torch.empty(shape) if workspace is None else workspace.take("outputs", shape)
    return mixes, room.transpose(0, 1) if by_group else room


def experts_at(bank: ExpertBank) -> tuple[int, int, int | None, int | None]:
    """Where the experts' weights and scales lie in memory."""
    tensors = (bank.lin1, bank.lin2, bank.scale1, bank.scale2)
    if bank.in_tiles:  # side by side
        one = bank.lin1[0].numel()
        assert bank.lin1.shape[0] == 1 or bank.lin1.stride(0) == bank.lin2.stride(0) == 2 * one
        assert bank.lin2.data_ptr() - bank.lin1.data_ptr() == one * bank.lin1.element_size()
    else:
        assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    assert bank.scale1 is None or bank.scale1.dtype is torch.float32
    first, second, scale1, scale2 = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    assert first is not None and second is not None
    return first, second, scale1, scale2


def is_half(weight: Tensor) -> bool:
    assert weight.dtype in (torch.float32, torch.bfloat16), "the kernels know float32 and bfloat16"
    return weight.dtype is torch.bfloat16
