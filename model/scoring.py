"""Loss of whole sequences under any arrangement of rows into groups, and of private rows beside any crowd.

``model.evaluate`` scores a checkpoint in the ways in which the server runs it; this scores what it would not do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import attend_whole_sequences
from model.config import ModelConfig
from model.groups import Fill, PrivateRows, SharedGroups
from model.mixing import ExpertBank
from model.native import Kernels
from model.reference import ReferenceCrowd
from model.transformer import Mix, Transformer


@torch.inference_mode()
def token_losses(model: Transformer, ids: Tensor, mix: Mix) -> Tensor:
    """Nats of each predicted token of ``ids [b, length + 1]``: ``[b, length]``. Rows run in the order of ``ids``."""
    count, length = ids.shape[0], ids.shape[1] - 1
    hidden = model(
        ids[:, :-1].flatten(),
        torch.arange(length).repeat(count),
        lambda _, qkv: attend_whole_sequences(qkv, count, model.config.n_head),
        mix,
    )
    losses = F.cross_entropy(model.logits(hidden).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.view(count, length)


def grouped_by(keys: Tensor, positions: Tensor, fill: Fill, config: ModelConfig) -> SharedGroups:
    """A ``mix`` in which rows of equal ``keys [n]`` are one group, in their order, completed by the crowd of its first
    row's position (``positions [n]``). No key may be more frequent than the groups are large."""
    _, group_of, sizes = torch.unique(keys, return_inverse=True, return_counts=True)
    rows = group_of.argsort(stable=True)
    first = sizes.cumsum(0) - sizes  # of each group, among the sorted rows
    rank = torch.arange(len(rows)) - first[group_of[rows]]
    largest = int(sizes.max())
    size = largest if fill.kind == "none" else config.group_size
    assert largest <= size, f"{largest} rows of one key in groups of {size}"
    return SharedGroups(
        config,
        fill,
        rows=rows,
        places=group_of[rows] * size + rank,
        positions=positions[rows[first]],
        largest=largest,
    )


@dataclass(frozen=True)
class Score:
    loss: float  # nats per token
    experts_per_token: float


def private_score(
    model: Transformer,
    windows: Tensor,
    crowd: ReferenceCrowd,
    *,
    temperature: float,
    skip_below: float = 0.0,
    kernels: Kernels | None = None,
) -> Score:
    """Every row of ``windows [n, length + 1]`` in a group with all members of the crowd but the last, however many
    these are."""
    config = model.config.replace(group_size=crowd.places.shape[2])
    fill, loss, used = Fill("reference", crowd), 0.0, 0.0
    for ids in torch.split(windows, 16):
        rows = ids[:, 1:].numel()
        mix = PrivateRows(
            config,
            fill,
            positions=torch.arange(ids.shape[1] - 1).repeat(len(ids)),
            temperatures=torch.full((rows,), temperature),
            skip_below=torch.full((rows,), skip_below),
            live=torch.ones(rows, dtype=torch.bool),
            kernels=kernels,
        )
        loss += float(token_losses(model, ids, mix).sum())
        used += float(mix.experts_used.sum()) / config.n_layer
    tokens = windows[:, 1:].numel()
    return Score(loss / tokens, used / tokens)


def crowd_of(activations: Tensor, banks: list[ExpertBank]) -> ReferenceCrowd:
    """A crowd of any number of members: ``activations [layers, positions, members + 1, D]``. The last one does not
    count: its place is the live row's."""
    return ReferenceCrowd(activations, banks, fingerprint=None)


def mean_loss(model: Transformer, windows: Tensor, batch: int, mix_of: Callable[[int], Mix]) -> float:
    """Nats per token over ``windows [n, length + 1]`` in batches of ``batch``; ``mix_of`` gets a batch's size."""
    total = 0.0
    for ids in torch.split(windows, batch):
        total += float(token_losses(model, ids, mix_of(len(ids))).sum())
    return total / windows[:, 1:].numel()
