"""What it costs a checkpoint that members of a group are positions apart in decoding: measured, stored, read.

Knows one model and some text; how a server weighs that cost is not known here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from model.errors import CheckpointError
from model.files import write_json
from model.groups import Fill
from model.scoring import grouped_by, token_losses
from model.transformer import Transformer

SPREAD_FILE = "grouping.json"
Curve = list[tuple[int, float]]  # positions apart, ascending from 0, and the nats per token that it costs


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


def apart_losses(model: Transformer, ids: Tensor, fill: Fill, furthest: int) -> Tensor:
    """Nats of each predicted token of one group's windows ``[size, length + 1]``, whose members decode up to
    ``furthest`` positions apart: ``[size, length]``."""
    size, length = ids.shape[0], ids.shape[1] - 1
    keys = decode_keys(head_starts(size, furthest), length)
    return token_losses(model, ids, grouped_by(keys, torch.arange(length).repeat(size), fill, model.config))


def spreads_of(length: int) -> list[int]:
    """Distances worth measuring on windows of so many tokens: 1, 4, 16, ... and half of them."""
    half = max(1, length // 2)
    return [4**power for power in range(half.bit_length()) if 4**power < half] + [half]


def measured_curve(
    model: Transformer, windows: Tensor, fill: Fill, told: Callable[[float], None] = lambda _: None
) -> Iterator[tuple[int, float]]:
    """Each distance of ``spreads_of`` and what it costs over equal positions, in nats per token, on the same tokens of
    ``windows [n, length + 1]`` (as many whole groups as there are). Never less than a smaller distance costs, which
    would be noise. ``told`` hears the share that is done. Raises ValueError when there is no whole group."""
    size, length = model.config.group_size, windows.shape[1] - 1
    groups = torch.split(windows[: len(windows) // size * size], size)
    if not len(windows) // size:
        raise ValueError(f"windows: {len(windows)} are fewer than one group of {size}")
    near = [apart_losses(model, ids, fill, 0) for ids in groups]
    least, spreads = 0.0, spreads_of(length)
    for number, furthest in enumerate(spreads, 1):
        told(number / (len(spreads) + 1))
        counted = full_steps(head_starts(size, furthest), length)
        far = (apart_losses(model, ids, fill, furthest) for ids in groups)
        cost = torch.stack([(loss - equal)[counted].mean() for loss, equal in zip(far, near, strict=True)]).mean()
        least = max(least, float(cost))
        yield furthest, least


def save_curve(curve: Curve, folder: Path) -> None:
    """Write ``grouping.json``, whole or not at all."""
    values = {"spreads": [spread for spread, _ in curve], "nats": [round(nats, 5) for _, nats in curve]}
    write_json(folder / SPREAD_FILE, values)


def load_curve(folder: Path) -> Curve | None:
    """None without ``grouping.json``. Raises CheckpointError naming the field that is wrong."""
    path = folder / SPREAD_FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        spreads, nats = [int(value) for value in values["spreads"]], [float(value) for value in values["nats"]]
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error!r}") from None
    if spreads[:1] != [0] or any(a >= b for a, b in pairwise(spreads)):
        raise CheckpointError(f"{path}: spreads must ascend from 0")
    if len(nats) != len(spreads) or nats[0] != 0 or not all(a <= b < math.inf for a, b in pairwise(nats)):
        raise CheckpointError(f"{path}: nats must be one number a spread, from 0, never falling")
    return list(zip(spreads, nats, strict=True))
