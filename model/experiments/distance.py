"""(e): how far apart the positions of a group's members may be, in decoding."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from model.experiments.catalogue import Catalogue
from model.experiments.suite import Suite, Trained
from model.spread import apart_losses, full_steps, head_starts


def distance(suite: Suite) -> dict[str, Any]:
    """Members' positions spread evenly over 1, 2, 4, ... up to half a window, before and after annealing. The
    same tokens mixed at equal positions are what each is compared with."""
    catalogue = Catalogue(suite.scale)
    rows = []
    for name, run in (("fixed", catalogue.unannealed()), ("annealed", catalogue.kind("mot"))):
        trained = suite.train(run)
        for power in range(round(math.log2(suite.scale.settings.length))):
            near, far = trained.measured(f"distance={2**power}", partial(_losses, trained, 2**power))
            rows.append({"temperature": name, "distance": 2**power, "loss": far, "loss_at_equal": near})
    return {"rows": rows, "summary": {name: _worst(rows, name) for name in ("fixed", "annealed")}}


def _worst(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    last = [row for row in rows if row["temperature"] == name][-1]
    return {"distance": last["distance"], "nats": last["loss"] - last["loss_at_equal"]}


def _losses(trained: Trained, furthest: int) -> tuple[float, float]:
    """Nats per token of the same tokens: mixed at equal positions, and with members up to ``furthest`` apart."""
    size, windows, fill = trained.config.group_size, trained.suite.windows(), trained.fill()
    counted = full_steps(head_starts(size, furthest), windows.shape[1] - 1)
    near, far = (
        torch.stack(
            [apart_losses(trained.model, ids, fill, apart)[counted].mean() for ids in torch.split(windows, size)]
        )
        for apart in (0, furthest)
    )
    return float(near.mean()), float(far.mean())
