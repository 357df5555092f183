"""What it costs that members of a group are positions apart, as measured. Knows no group.

Nats per token above mixing at equal positions, for groups whose members lie up to so many positions apart; linear in
between, flat beyond the last figure. ``motserve calibrate`` measures a checkpoint's own; the tables here are of a small
model (DESIGN, section 1) and stand in for it where it was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_UNITS = 1_000_000  # of a nat: costs are whole numbers, so that sums and comparisons are exact


@dataclass(frozen=True)
class SpreadLoss:
    """``spreads`` (positions, ascending from 0) and what each costs in ``nats`` per token."""

    name: str
    spreads: tuple[int, ...]
    nats: tuple[float, ...]

    def of(self, spread: int) -> float:
        """Nats per token of a group with this distance between its outermost members."""
        return float(np.interp(spread, self.spreads, self.nats))

    def costs(self, spreads: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same in millionths of a nat, whole, and one more for every position: nearer members are better where
        the measured loss is flat, too."""
        return np.rint(np.interp(spreads, self.spreads, self.nats) * _UNITS).astype(np.int64) + spreads


_MEASURED_AT = (0, 4, 8, 16, 32, 96)
MIXED = SpreadLoss("mixed", _MEASURED_AT, (0.0, 0.06, 0.08, 0.11, 0.14, 0.16))  # trained at T = 1
ANNEALED = SpreadLoss("annealed", _MEASURED_AT, (0.0, 0.01, 0.01, 0.02, 0.04, 0.07))  # to T = 0.1
LOSSES = {loss.name: loss for loss in (MIXED, ANNEALED)}


def loss_at(temperature: float) -> SpreadLoss:
    """The table measured nearer to a checkpoint's temperature, by ratio."""
    return ANNEALED if temperature * temperature <= 0.1 else MIXED
