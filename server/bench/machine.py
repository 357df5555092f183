"""What this machine can do at best: bytes read and multiplications, a second. Knows nothing of models."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from model.memory import empty_in_large_pages

_READ_BYTES = 2**28  # beyond any cache
_SQUARE = 1024


@dataclass(frozen=True)
class Limits:
    """``bandwidth`` in bytes a second; ``matmul`` in operations a second of a large product of the type asked for."""

    device: str
    threads: int
    bandwidth: float
    matmul: float

    def as_dict(self) -> dict[str, object]:
        return {f"machine_{name}": value for name, value in asdict(self).items()}


def seconds_of(work: Callable[[], object], *, repeats: int = 5, device: torch.device | None = None) -> float:
    """Median time of ``work``, after one run that is not counted."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


@functools.cache
def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measured once a process: the best of a few ways for each."""
    with torch.inference_mode():
        if device.type == "cpu":
            words = empty_in_large_pages((_READ_BYTES // 4,), torch.float32).fill_(1)
        else:
            words = torch.ones(_READ_BYTES // 4, device=device)
        integers = words.view(torch.int32)
        reading = min(
            seconds_of(lambda: words.sum(), device=device),
            seconds_of(lambda: words.max(), device=device),
            seconds_of(lambda: integers.max(), device=device),
        )
        square = torch.ones(_SQUARE, _SQUARE, dtype=dtype, device=device)
        product = seconds_of(lambda: square @ square, device=device)
    return Limits(str(device), torch.get_num_threads(), _READ_BYTES / reading, 2 * _SQUARE**3 / product)
