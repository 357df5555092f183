"""The processes that train one model together, started by torchrun: who they are, and averages over them.

Every process holds the whole model and computes its part of each batch; gradients are averaged in one piece after the
backward pass. Knows tensors, nothing of models.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import TrainingError

# The first process evaluates and writes checkpoints alone while the others wait.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Workers:
    """This process's place among ``count`` ones, and its device."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @torch.no_grad()
    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, the same bits in all of them."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


def resolve_device(device: str) -> torch.device:
    """``auto``: CUDA where there is some. Raises TrainingError."""
    if device not in ("auto", "cpu", "cuda"):
        raise TrainingError(f"device must be auto, cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device: there is no CUDA device here, or this torch is built without CUDA")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise TrainingError(f"device: process {local} of this machine finds {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", local)


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Workers]:
    """The processes that torchrun started (its variables RANK and WORLD_SIZE say so), else this one alone. They talk
    through NCCL on CUDA, else gloo. Raises TrainingError for a device that is not there."""
    place = resolve_device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Workers(device=place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
