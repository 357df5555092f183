"""(g): how many reference crowds are needed, and how large."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.experiments.catalogue import Catalogue
from model.experiments.suite import Suite, Trained
from model.scoring import crowd_of, private_score

_CROWDS = 8
_LARGEST = 4  # times the group size


def crowds(suite: Suite) -> dict[str, Any]:
    """Private rows beside each of eight crowds: one is enough if it hardly matters which. Then beside crowds from one
    member to four times as many as in training, at the checkpoint's temperature and at 0."""
    trained = suite.train(Catalogue(suite.scale).kind("mot"))
    mixed = trained.score("mixed").perplexity
    reached = trained.config.temperature
    rows: list[dict[str, Any]] = []
    for seed in range(_CROWDS):
        for temperature in (reached, 0.0):
            found = trained.score("private", temperature=temperature, crowd=seed)
            rows.append(
                {"crowd": seed, "members": trained.config.group_size - 1, "temperature": temperature,
                 "over_mixed": found.perplexity / mixed, "experts_per_token": found.experts_per_token}
            )  # fmt: skip
    summary = {f"T={t:g}": _scatter([row["over_mixed"] for row in rows if row["temperature"] == t])
               for t in (reached, 0.0)}  # fmt: skip
    return {"rows": rows + _sizes(trained, mixed, (reached, 0.0)), "summary": {"crowds": _CROWDS, **summary}}


def _scatter(ratios: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(ratios), "deviation": statistics.stdev(ratios),
            "least": min(ratios), "greatest": max(ratios)}  # fmt: skip


def _sizes(trained: Trained, mixed: float, temperatures: tuple[float, ...]) -> list[dict[str, Any]]:
    rows = []
    largest = _LARGEST * trained.config.group_size
    for power in range(round(math.log2(largest)) + 1):
        members = 2**power - 1
        for temperature in temperatures:
            if members == 0:
                continue
            loss, experts = trained.measured(
                f"members={members} T={temperature:g}", partial(_beside, trained, members, temperature)
            )
            rows.append(
                {"crowd": "first", "members": members, "temperature": temperature,
                 "over_mixed": math.exp(loss) / mixed, "experts_per_token": experts}
            )  # fmt: skip
    return rows


def _beside(trained: Trained, members: int, temperature: float) -> tuple[float, float]:
    """Loss and experts a token beside the first ``members`` of as many crowds as that takes, put together."""
    size = trained.config.group_size
    seen: list[Tensor] = [trained.crowd(seed).places.flip(2) for seed in range(-(-(members + 1) // size))]
    crowd = crowd_of(torch.cat(seen, 2)[:, :, : members + 1], trained.model.banks)
    found = private_score(
        trained.model, trained.suite.windows(), crowd, temperature=temperature, kernels=trained.suite.kernels
    )
    return found.loss, found.experts_per_token
