"""MoT and Expert Choice as the engine runs them: shared groups of live rows, private rows beside the reference crowd.

Both are ``mix`` callables for ``Transformer.forward``. They know rows, places and positions, nothing of requests.
The plain twin of both is ``mixing.mix_groups`` on the same members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.layers import TILE, activate_rows, tile_matmul
from model.memory import Workspace
from model.mixing import ExpertBank, exact_products, mixing_entropy, mixing_weights
from model.native import Kernels
from model.reference import ReferenceCrowd

GroupFill = Literal["reference", "zeros", "none"]


@dataclass(frozen=True)
class Fill:
    """What completes a group: the crowd (zeros count as one), or nothing when ``crowd`` is None."""

    kind: GroupFill
    crowd: ReferenceCrowd | None

    @classmethod
    def build(cls, kind: GroupFill, config: ModelConfig, banks: list[ExpertBank], crowd: ReferenceCrowd | None) -> Fill:
        """``reference`` without a crowd becomes ``zeros``: the caller says so to the user."""
        if kind == "none":
            return cls("none", None)
        if kind == "reference" and crowd is not None:
            return cls("reference", crowd)
        return cls("zeros", ReferenceCrowd.zeros(config, banks))


class SharedGroups:
    """``mix`` for live rows in groups of at most G, each completed by its position's fill.

    ``rows [k]`` and ``places [k]`` say which row stands where in the flattened ``[n, G]`` places (the live ones
    first in each group); ``positions [n]`` says whose crowd completes a group. Rows in no group get zeros. With
    ``kernels``, few groups go through the experts at the speed of memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        fill: Fill,
        *,
        rows: Tensor,
        places: Tensor,
        positions: Tensor,
        largest: int,
        kernels: Kernels | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        # Without fill a group is only as wide as the largest one is live.
        self._size = config.group_size if fill.kind != "none" else largest
        self._temperature = config.temperature
        self._fill, self._rows, self._places, self._positions = fill, rows, places, positions
        self._kernels, self._workspace = kernels, workspace
        self.entropy = torch.zeros(positions.shape[0], device=positions.device)  # [n], summed over the layers
        self._empty: Tensor | None = None
        if fill.kind == "none":
            self._empty = torch.ones(positions.shape[0] * self._size, dtype=torch.bool, device=positions.device)
            self._empty.index_fill_(0, places, False)
        # Full groups of all rows in their order, as most are when many requests advance together: nothing to gather.
        full = positions.shape[0] * self._size
        self._in_order = rows.shape[0] == full and kernels is not None
        if self._in_order:
            order = torch.arange(full, device=rows.device)
            self._in_order = torch.equal(rows, order) and torch.equal(places, order)

    def __call__(self, layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
        members, merge, emit = self._members(layer, bank, x)
        kernels = self._kernels
        mixes = self._mixes(members, merge)
        if kernels is not None and kernels.prefers(mixes.shape[1], bank):
            outputs = kernels.bank(mixes, bank, self._workspace)
        else:
            outputs = bank.experts(mixes.to(bank.controller.dtype))
        return self.redistribute(outputs, emit, x)

    def mix(self, layer: int, bank: ExpertBank, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts get ``[E, n, D]``, and the weights by which their answers count ``[n, G, E]``."""
        members, merge, emit = self._members(layer, bank, x)
        return self._mixes(members, merge), emit

    def redistribute(self, outputs: Tensor, emit: Tensor, x: Tensor) -> Tensor:
        """The experts' answers ``[E, n, D]`` back to the rows of ``x``."""
        outputs = outputs.to(torch.promote_types(outputs.dtype, x.dtype))
        return self._to_rows(torch.bmm(emit.to(outputs.dtype), outputs.transpose(0, 1)), x)

    def _members(self, layer: int, bank: ExpertBank, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Members ``[n, G, D]``, and the weights that mix and those that redistribute ``[n, G, E]``."""
        live = x[: self._rows.shape[0]] if self._in_order else x[self._rows]
        members, scores = self._gather(layer, bank, live)
        if self._empty is not None:
            scores.view(-1, scores.shape[2]).masked_fill_(self._empty[:, None], float("-inf"))
        merge, emit = self._weights(bank, scores)
        return members, merge, torch.nan_to_num(emit) if self._empty is not None else emit

    def _mixes(self, members: Tensor, merge: Tensor) -> Tensor:
        """``[E, n, D]``."""
        weights, room = merge.transpose(1, 2).to(members.dtype), None
        if self._workspace is not None and members.dtype is torch.float32:
            room = self._workspace.take("mixes", (*weights.shape[:2], members.shape[2]))
        return torch.bmm(weights, members, out=room).transpose(0, 1)

    def _to_rows(self, out: Tensor, x: Tensor) -> Tensor:
        """What the groups' places ``[n, G, D]`` got, for the rows of ``x``."""
        if self._in_order and self._rows.shape[0] == x.shape[0]:
            return out.view(x.shape).to(x.dtype)
        result = torch.zeros_like(x)
        result.index_copy_(0, self._rows, out.view(-1, x.shape[1])[self._places].to(x.dtype))
        return result

    def _weights(self, bank: ExpertBank, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Those that mix and those that redistribute ``[n, G, E]``; may overwrite ``scores``."""
        plain = not (bank.over_experts or bank.discrete or bank.gated) and self._temperature > 0
        if plain and self._kernels is not None:
            merge = self._kernels.mix_weights(scores, self._temperature, self.entropy)
            return merge, merge
        merge, emit = mixing_weights(
            scores, self._temperature, over_experts=bank.over_experts, discrete=bank.discrete, gated=bank.gated
        )
        self.entropy += mixing_entropy(merge)
        return merge, emit

    def _gather(self, layer: int, bank: ExpertBank, live: Tensor) -> tuple[Tensor, Tensor]:
        """Members ``[n, G, D]`` and float32 scores ``[n, G, E]``; the crowd's scores are known beforehand. With kernels
        members are float32 too, which such machines compute fastest in."""
        count, width = self._positions.shape[0], live.shape[1]
        dtype = live.dtype if self._kernels is None else torch.float32
        if self._kernels is not None:
            own = self._kernels.linear(live, bank.controller, None, by_output=False, exact=True)
        else:
            own = exact_products(live, bank.controller)
        own = bank.scores(own)
        if self._in_order:
            return live.to(dtype).view(count, self._size, width), own.view(count, self._size, -1)
        if self._fill.crowd is None:
            members = own.new_zeros(count, self._size, width, dtype=dtype)
            scores = own.new_zeros(count, self._size, own.shape[1])
        else:
            members = _copied(self._fill.crowd.at(layer, self._positions), dtype)
            scores = _copied(self._fill.crowd.scores_at(layer, self._positions).transpose(1, 2), own.dtype)
        members.view(-1, width).index_copy_(0, self._places, live.to(dtype))
        scores.view(-1, own.shape[1]).index_copy_(0, self._places, own)
        return members, scores


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, whatever the shape: the crowd itself is never written."""
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


class PrivateRows:
    """``mix`` for private rows: each in a group of its own with the first G-1 reference members of its position.

    ``positions``, ``temperatures`` and ``skip_below`` are ``[n]``; ``live [n]`` is False for padding rows, which use no
    expert. Above temperature 0 a row uses the experts whose redistribution weight reaches its threshold; at 0 those
    whose score it wins against the crowd's ``rivals``, alone. Experts run in order, in the kernels row by row or, the
    plain form, in tiles of constant shape: a row's bits depend on no other row. ``every``: without kernels all experts
    run on all rows, as a GPU, where it is the default, does sooner than find out which are needed.
    """

    def __init__(
        self,
        config: ModelConfig,
        fill: Fill,
        *,
        positions: Tensor,
        temperatures: Tensor,
        skip_below: Tensor,
        live: Tensor,
        kernels: Kernels | None = None,
        every: bool | None = None,
    ) -> None:
        self._kernels, self._temperatures = kernels, temperatures
        self._every = positions.is_cuda if every is None else every
        self._fill, self._positions, self._live = fill, positions, live
        self._unmixed = temperatures == 0
        self._divisor = torch.where(self._unmixed, torch.ones_like(temperatures), temperatures)
        self._skip_below = skip_below
        self._rivals = config.group_size - 1 if fill.crowd is not None else 0
        self.entropy = torch.zeros(positions.shape[0], device=positions.device)  # [n], summed over the layers
        self.experts_used = torch.zeros(positions.shape[0], dtype=torch.int64, device=positions.device)

    def __call__(self, layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
        if self._kernels is not None:
            return self.beside(layer, bank, x, x.new_empty(bank.lin1.shape[0], 0, x.shape[1]))[0]
        own = bank.scores(tile_matmul(x.float(), bank.controller.float()))  # [n, E]
        mixes, emit = self._weights(layer, bank, x, own)
        used = (emit >= self._skip_below[:, None]) & (emit > 0) & self._live[:, None]
        self.experts_used += used.sum(1)
        return (every_expert if self._every else sparse_experts)(bank, mixes, emit, used)

    def beside(
        self, layer: int, bank: ExpertBank, x: Tensor, mixes: Tensor, workspace: Workspace | None = None
    ) -> tuple[Tensor, Tensor]:
        """With kernels: this layer for ``x``, and shared groups' ``mixes [E, n, D]`` through the same experts while
        their weights are at hand."""
        crowd = self._fill.crowd
        assert self._kernels is not None, "the plain path runs private rows apart"
        out, outputs = self._kernels.private_layer(
            x, bank, None if crowd is None else (crowd.places[layer], crowd.scores[layer]),
            rivals=0 if crowd is None else crowd.rivals,
            positions=self._positions, temperatures=self._temperatures, skip_below=self._skip_below, live=self._live,
            entropy=self.entropy, used=self.experts_used, mixes=mixes, workspace=workspace,
        )  # fmt: skip
        return out.to(x.dtype), outputs

    def _weights(self, layer: int, bank: ExpertBank, x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """The mix that each expert would see ``[n, E, D]`` and the weight with which its answer counts ``[n, E]``."""
        members = x[:, None]  # [n, 1, D]
        scores = own[:, :, None]  # [n, E, 1]
        if self._rivals:
            assert self._fill.crowd is not None
            others = self._fill.crowd.at(layer, self._positions)[:, 1:]  # [n, G-1, D]
            members = torch.cat((members, others), 1)
            scores = torch.cat((scores, self._fill.crowd.scores_at(layer, self._positions)[:, :, 1:]), 2)
        if bank.discrete:
            merge = torch.zeros_like(scores).scatter_(2, scores.argmax(2, keepdim=True), 1.0)
        else:
            # The last dimension holds one row's members: this softmax is computed row by row.
            merge = torch.softmax(scores / self._divisor[:, None, None], dim=2)
        wins = torch.ones_like(own, dtype=torch.bool)
        if self._rivals and self._fill.crowd is not None:
            wins = own > scores[:, :, 1 : 1 + self._fill.crowd.rivals].amax(2)
        merge = torch.where(self._unmixed[:, None, None], _first_only(wins, scores.shape[2]), merge)
        self.entropy += mixing_entropy(merge.transpose(1, 2))
        emit = merge[:, :, 0]
        if bank.over_experts:
            best = torch.zeros_like(own).scatter_(1, own.argmax(1, keepdim=True), 1.0)
            spread = best if bank.discrete else torch.softmax(own / self._divisor[:, None], dim=1)
            emit = torch.where(self._unmixed[:, None], best * wins, spread)
        if bank.gated:
            emit = emit * own
        mixes = torch.bmm(merge.to(x.dtype), members)
        return torch.where(self._unmixed[:, None, None], x[:, None], mixes), emit


def _first_only(wins: Tensor, size: int) -> Tensor:
    """``wins [n, E]`` to weights ``[n, E, size]``: all on the first member, or none at all."""
    weights = wins.new_zeros(*wins.shape, size, dtype=torch.float32)
    weights[:, :, 0] = wins
    return weights


def every_expert(bank: ExpertBank, mixes: Tensor, emit: Tensor, used: Tensor) -> Tensor:
    """What ``sparse_experts`` computes, without asking which experts are used: no shape depends on a value."""
    outputs = bank.experts(mixes.transpose(0, 1).to(bank.controller.dtype))  # [E, n, D]
    outputs = outputs.to(torch.promote_types(outputs.dtype, mixes.dtype))
    weights = torch.where(used, emit, 0.0).to(outputs.dtype)
    return torch.bmm(weights[:, None], outputs.transpose(0, 1))[:, 0].to(mixes.dtype)


def sparse_experts(bank: ExpertBank, mixes: Tensor, emit: Tensor, used: Tensor) -> Tensor:
    """Sum over the used experts of ``emit[t, e] * expert_e(mixes[t, e])``: ``[n, D]``, experts in ascending order."""
    out = torch.zeros(mixes.shape[0], mixes.shape[2], dtype=torch.float32, device=mixes.device)
    experts, rows = used.t().nonzero(as_tuple=True)
    order = experts.tolist()
    begin = 0
    while begin < len(order):
        expert, end = order[begin], begin
        first, second = bank.expert(expert)
        while end < len(order) and order[end] == expert and end - begin < TILE:
            end += 1
        chosen = rows[begin:end]
        tile = mixes.new_zeros(TILE, mixes.shape[2])
        tile[: end - begin] = mixes[chosen, expert]
        hidden = activate_rows(bank.activation, tile_matmul(tile, first))
        answer = tile_matmul(hidden, second)[: end - begin].float()
        out[chosen] += emit[chosen, expert, None] * answer
        begin = end
    return out.to(mixes.dtype)
