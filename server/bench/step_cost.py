"""What an engine step takes, by groups and rows: measured on this machine, or given. Knows no schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from model.config import ModelConfig
from server.bench.engine import EngineLoad, bench_engine
from server.bench.kernel import KernelBench
from server.bench.machine import machine_of
from server.bench.shapes import random_model
from server.config import Settings
from server.engine.request import Privacy
from server.loading import build_engine, resolve_device, resolve_dtype, resolve_kernels

_COUNTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)
_SEVERAL = 32
_ROWS = (1, 48)


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: ``base``, ``per_row``, and the experts' by the number of groups: ``groups`` (ascending,
    from 1) and ``seconds`` of each, linear in between and, by the last two, beyond."""

    base: float
    per_row: float
    groups: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, groups: int, rows: int) -> float:
        return self.base + self.per_row * rows + (self.experts(groups) if groups else 0.0)

    @property
    def balance(self) -> int:
        """Groups until computing costs as much as reading, as the server measures it: the time of one over what each
        further one adds, up to 256."""
        one, several = self.experts(1), self.experts(_SEVERAL)
        return max(1, min(256, round(one / max((several - one) / (_SEVERAL - 1), 1e-9))))

    def experts(self, groups: int) -> float:
        last, seconds = self.groups[-1], float(np.interp(groups, self.groups, self.seconds))
        slope = (self.seconds[-1] - self.seconds[-2]) / (last - self.groups[-2])
        return seconds + slope * max(0, groups - last)


def parse_cost(text: str) -> StepCost:
    """``a,b,c``: milliseconds of reading the weights, of each group and of each row. Raises ValueError."""
    try:
        read, group, row = (float(part) / 1000 for part in text.split(","))
    except ValueError:
        read = group = row = -1.0
    if not (all(0 <= part < 1e6 for part in (read, group, row)) and read + group > 0):
        raise ValueError(f"step_cost: {text!r} is not three numbers of milliseconds such as 20,0.3,0.1")
    return StepCost(0.0, row, (1, 2), (read + group, read + 2 * group))


def measure_cost(
    shape: str, config: ModelConfig, settings: Settings, progress: Callable[[float], None] = lambda _: None
) -> StepCost:
    """The experts by themselves at several numbers of groups; the rest of the model and the engine's own work from
    whole steps of one row and of many. Raises ValueError naming the setting that the machine cannot serve."""
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    machine = machine_of(device, dtype)
    tested = KernelBench(shape, config, dtype, machine, resolve_kernels(settings.kernels, device))
    taken = []
    for done, result in enumerate(tested.run(list(_COUNTS), ["public"]), 1):
        taken.append(result.seconds * config.n_layer)
        progress(done / len(_COUNTS) * 0.7)
    # Fewer groups cannot take longer than more: where they did, something else ran beside.
    curve = StepCost(0.0, 0.0, _COUNTS, tuple(min(taken[place:]) for place in range(len(taken))))
    del tested  # its weights
    model, fill = random_model(config, dtype=dtype, device=device)
    engine = build_engine(settings, model, fill, None)
    loads = [EngineLoad(rows, 0.0, 16, 12) for rows in _ROWS]
    few, many = bench_engine(engine, loads, machine, Privacy(config.temperature, 0.0), repeats=3)
    progress(1.0)
    rest = [max(0.0, found.step_seconds - curve.experts(round(found.groups_per_step))) for found in (few, many)]
    per_row = max(0.0, (rest[1] - rest[0]) / (_ROWS[1] - _ROWS[0]))
    return replace(curve, base=max(0.0, rest[0] - per_row * _ROWS[0]), per_row=per_row)
