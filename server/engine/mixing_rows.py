"""A plan's rows as the model's ``mix``: its groups, and its private rows."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from model.config import ModelConfig
from model.groups import Fill, PrivateRows, SharedGroups
from model.memory import Workspace
from model.native import Kernels
from server.engine.batch import Batch
from server.engine.plan import Group


def shared_groups(
    config: ModelConfig,
    fill: Fill,
    batch: Batch,
    groups: Many[Group],
    kernels: Kernels | None = None,
    workspace: Workspace | None = None,
) -> SharedGroups | None:
    """``groups`` of the batch's rows; None without any."""
    if not groups:
        return None
    largest = max(len(group.rows) for group in groups)
    width = config.group_size if fill.kind != "none" else largest
    return SharedGroups(
        config,
        fill,
        rows=batch.numbers([row for group in groups for row in group.rows]),
        places=batch.numbers([n * width + i for n, group in enumerate(groups) for i in range(len(group.rows))]),
        positions=batch.numbers([group.position for group in groups]),
        largest=largest,
        kernels=kernels,
        workspace=workspace,
    )


def private_rows(
    config: ModelConfig, fill: Fill, batch: Batch, *, padding: int = 0, kernels: Kernels | None = None
) -> PrivateRows | None:
    """All rows of the batch, and rows that use no expert after them; None where nothing mixes."""
    if not config.is_grouped or not batch.chunks:
        return None
    temperatures, skip_below = batch.privacy()
    zeros = batch.numbers([0] * padding)
    live = torch.arange(batch.rows + padding, device=zeros.device) < batch.rows
    return PrivateRows(
        config,
        fill,
        positions=torch.cat((batch.positions(), zeros)),
        temperatures=torch.cat((temperatures, temperatures.new_ones(padding))),
        skip_below=torch.cat((skip_below, skip_below.new_zeros(padding))),
        live=live,
        kernels=kernels,
    )
