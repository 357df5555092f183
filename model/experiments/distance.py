"""(e): how far apart the positions of a group's members may be, in decoding."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.experiments.catalogue import Catalogue
from model.experiments.scoring import grouped_by, token_losses
from model.experiments.suite import Suite, Trained


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
    size = trained.config.group_size
    windows = trained.suite.windows()
    fill = trained.fill()
    near = far = 0.0
    scored = 0
    for ids in torch.split(windows, size):
        length = ids.shape[1] - 1
        positions = torch.arange(length).repeat(len(ids))
        ahead = head_starts(size, furthest)
        together = grouped_by(positions, positions, fill, trained.config)
        apart = grouped_by(decode_keys(ahead, length), positions, fill, trained.config)
        counted = full_steps(ahead, length)
        near += float(token_losses(trained.model, ids, together)[counted].sum())
        far += float(token_losses(trained.model, ids, apart)[counted].sum())
        scored += int(counted.sum())
    return near / scored, far / scored


def head_starts(size: int, furthest: int) -> Tensor:
    """How many tokens each member of a group is ahead of the last one: ``[size]``, from 0 to ``furthest``."""
    return torch.linspace(0, furthest, size).round().long()


def decode_keys(ahead: Tensor, length: int) -> Tensor:
    """Who meets whom: each sequence's first ``ahead`` tokens are a prompt, which meets its equals in position; the rest
    is decoded, a token a step by all. So a row meets only rows of its own step or prompt position, and whatever
    these know was known before: nobody sees its future. ``[size * length]``."""
    positions = torch.arange(length)[None].expand(len(ahead), -1)
    step = positions - ahead[:, None]
    return torch.where(step < 0, positions, length + step).flatten()


def full_steps(ahead: Tensor, length: int) -> Tensor:
    """The rows of those steps in which everybody still decodes: ``[size, length]``."""
    step = torch.arange(length)[None] - ahead[:, None]
    return (step >= 0) & (step < length - int(ahead.max()))
