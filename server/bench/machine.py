"""What this machine can do at best: bytes read and multiplications, a second. Knows nothing of models."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from model.memory import empty_in_large_pages
from model.native import computes_in_bfloat16

_READ_BYTES = 2**28  # beyond any cache
_SQUARE = 1024
_LONG = 1.0  # seconds


@dataclass(frozen=True)
class Limits:
    """``bandwidth`` in bytes a second; ``matmul`` in operations a second of a large product in ``matmul_dtype``: the
    type asked for or, on a CPU that has no instructions for it, float32."""

    device: str
    threads: int
    bandwidth: float
    matmul: float
    matmul_dtype: str

    def as_dict(self) -> dict[str, object]:
        return {f"machine_{name}": value for name, value in asdict(self).items()}


def seconds_of(work: Callable[[], object], *, repeats: int = 5, device: torch.device | None = None) -> float:
    """Median time of ``work``, after one run that is not counted unless it is so long that it must do."""
    times: list[float] = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
        if times[0] > _LONG:
            return times[0]
    return statistics.median(times[1:])


class Machine:
    """Measures its limits again whenever asked: on a virtual machine they change from minute to minute, and a fraction
    is only fair to what was possible then."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        if device.type == "cpu":
            words = empty_in_large_pages((_READ_BYTES // 4,), torch.float32).fill_(1)
        else:
            words = torch.ones(_READ_BYTES // 4, device=device)
        slow = device.type == "cpu" and not computes_in_bfloat16()
        self._type = torch.float32 if slow else dtype
        self._square = torch.ones(_SQUARE, _SQUARE, dtype=self._type, device=device)
        ways: tuple[Callable[[], Tensor], ...] = (words.sum, words.max, words.view(torch.int32).max)
        self._read = min(ways, key=lambda way: seconds_of(way, device=device))

    @torch.inference_mode()
    def limits(self, repeats: int = 3) -> Limits:
        reading = seconds_of(self._read, repeats=repeats, device=self.device)
        product = seconds_of(lambda: self._square @ self._square, repeats=repeats, device=self.device)
        name = str(self._type).removeprefix("torch.")
        return Limits(str(self.device), torch.get_num_threads(), _READ_BYTES / reading, 2 * _SQUARE**3 / product, name)


def median_of(found: Sequence[Limits]) -> Limits:
    """Of several measurements on one machine."""
    bandwidth, matmul = (statistics.median(getattr(each, name) for each in found) for name in ("bandwidth", "matmul"))
    return replace(found[0], bandwidth=bandwidth, matmul=matmul)


@functools.cache
def machine_of(device: torch.device, dtype: torch.dtype) -> Machine:
    """One a process: it keeps memory to read."""
    return Machine(device, dtype)
