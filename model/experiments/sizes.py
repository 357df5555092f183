"""(d): how many live tokens a group has at evaluation, and what completes it."""

from __future__ import annotations

import math
from typing import Any

import torch

from model.experiments.catalogue import Catalogue
from model.experiments.suite import Suite, Trained
from model.groups import Fill, GroupFill, SharedGroups
from model.scoring import grouped_by, mean_loss

_LARGEST = 4  # times the training value


def group_size(suite: Suite) -> dict[str, Any]:
    """Live members from one up to four times the group size of training. Below that size the rest of the group is
    the reference crowd, zeros or nothing; above it the groups are larger than in training, and all live."""
    trained = suite.train(Catalogue(suite.scale).kind("mot"))
    size = trained.config.group_size
    rows = []
    for live in (2**power for power in range(round(math.log2(_LARGEST * size)) + 1)):
        fills: tuple[GroupFill, ...] = ("reference", "zeros", "none") if live < size else ("none",)
        rows += [
            {"live": live, "fill": fill if live < size else "all live", "loss": _loss(trained, live, fill)}
            for fill in fills
        ]
    full = next(row["loss"] for row in rows if row["live"] == size)
    for row in rows:
        row["over_training"] = math.exp(row["loss"] - full)
    return {"rows": rows, "summary": {"group_size": size, "loss": full}}


def _loss(trained: Trained, live: int, kind: GroupFill) -> float:
    config = trained.config.replace(group_size=max(live, trained.config.group_size))
    windows = trained.suite.windows()
    length = windows.shape[1] - 1

    def mix_of(count: int) -> SharedGroups:
        positions = torch.arange(length).repeat(count)
        sequence = torch.arange(count).repeat_interleave(length)
        fill = Fill.build(kind, config, trained.model.banks, trained.crowd() if kind == "reference" else None)
        return grouped_by(sequence // live * length + positions, positions, fill, config)

    batch = max(live, min(len(windows), 64))
    return float(trained.measured(f"live={live} fill={kind}", lambda: mean_loss(trained.model, windows, batch, mix_of)))
