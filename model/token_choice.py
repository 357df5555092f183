"""Token choice: every token goes, by itself, to the experts that it scores best.

    p[t]   = softmax over e of x_t . controller[:,e]            probabilities, over the routed experts
    g[t,e] = p[t,e] for the k best experts of t, else 0         gates; ties go to the lowest expert
    out_t  = sum_e g[t,e] expert_e(x_t) + sum_s expert_s(x_t)   s: the shared experts, which every token uses

``switch`` has k = 1 and no shared expert (Fedus et al., arXiv 2101.03961, section 2.1). ``top-k`` has k fine-grained
experts and shared ones (DeepSeekMoE, Dai et al., arXiv 2401.06066, section 3); gates are the probabilities
themselves, as there, or, by ``normalize_gates``, over their sum.

Only training knows the balance loss and Switch's capacity. Serving and evaluation never drop a token: whether one
is beyond an expert's capacity depends on who else is there, and a request's answer would with it. Knows rows, nothing
of groups, requests or positions. Each class is a ``mix`` for ``Transformer.forward``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.groups import every_expert, sparse_experts
from model.layers import tile_matmul
from model.mixing import ExpertBank, exact_products
from model.native import Kernels


def chosen_experts(scores: Tensor, count: int) -> Tensor:
    """True at the ``count`` best of each row of ``scores [n, E]``, ties to the lowest expert: ``[n, E]``."""
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def gates_of(bank: ExpertBank, probabilities: Tensor, chosen: Tensor) -> Tensor:
    """``probabilities`` and ``chosen [n, E]`` to gates ``[n, E + shared]``, those of shared experts being 1."""
    gates = torch.where(chosen, probabilities, 0.0)
    if bank.normalize:
        gates = gates / gates.sum(1, keepdim=True)
    return torch.cat((gates, gates.new_ones(gates.shape[0], bank.shared)), 1)


class TokenChoice:
    """For evaluation and serving. A row's result depends on that row alone: bit for bit with ``kernels`` or, the plain
    form for private rows, ``tiled``; up to rounding in the plain form for public rows, expert by expert. ``every``: all
    experts on all rows, as in ``groups.PrivateRows``."""

    def __init__(self, kernels: Kernels | None = None, *, tiled: bool = False, every: bool = False) -> None:
        self._kernels, self._tiled, self._every = kernels, tiled, every

    def __call__(self, layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
        if self._kernels is not None:
            scores = self._kernels.linear(x, bank.controller, None, by_output=False, exact=True)
            return self._kernels.routed(x, self._kernels.gates(scores, bank), bank).to(x.dtype)
        if self._every:
            gates = _gates(bank, exact_products(x, bank.controller))
            return every_expert(bank, x[:, None].expand(-1, gates.shape[1], -1), gates, gates > 0)
        if self._tiled:
            gates = _gates(bank, tile_matmul(x.float(), bank.controller.float()))
            return sparse_experts(bank, x[:, None].expand(-1, gates.shape[1], -1), gates, gates > 0)
        return by_expert(bank, x, _gates(bank, exact_products(x, bank.controller)))


def _gates(bank: ExpertBank, scores: Tensor) -> Tensor:
    return gates_of(bank, torch.softmax(scores, 1), chosen_experts(scores, bank.per_token))


def by_expert(bank: ExpertBank, x: Tensor, gates: Tensor) -> Tensor:
    """``x [n, D]`` through the experts whose ``gates [n, E]`` are above 0, all rows of an expert at once, answers
    weighted by the gates and added up: ``[n, D]``. With gradients."""
    used = gates > 0
    experts, rows = used.t().nonzero(as_tuple=True)
    answers = []
    for number, part in enumerate(torch.split(x[rows], used.sum(0).tolist())):
        lin1, lin2 = bank.expert(number)
        answers.append(bank.activation(part @ lin1) @ lin2)
    out = torch.zeros_like(x, dtype=gates.dtype)
    return out.index_add(0, rows, gates[rows, experts, None] * torch.cat(answers)).to(x.dtype)


class TrainedTokenChoice:
    """For training. ``balance`` collects each layer's balance loss; ``capacity_factor`` None drops no token."""

    def __init__(self, capacity_factor: float | None) -> None:
        self._capacity_factor = capacity_factor
        self.balance: list[Tensor] = []

    def __call__(self, layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
        scores = exact_products(x, bank.controller)
        probabilities = torch.softmax(scores, 1)
        chosen = chosen_experts(scores, bank.per_token)
        self.balance.append(balance_loss(probabilities, chosen))
        gates = gates_of(bank, probabilities, chosen)
        if self._capacity_factor is not None:
            room = within_capacity(chosen, self._capacity_factor)
            gates = torch.cat((gates[:, : chosen.shape[1]] * room, gates[:, chosen.shape[1] :]), 1)
        return by_expert(bank, x, gates)


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """``E sum_e f_e P_e`` with f the share of all choices that fell on an expert and P its mean probability, both
    ``[n, E]`` (Fedus et al., section 2.2; Dai et al., section 3.3, which counts each of k choices as
    1/k of a token). 1 where all are even; gradients flow through P."""
    share = chosen.sum(0) / chosen.sum()
    return probabilities.shape[1] * (share * probabilities.mean(0)).sum()


def within_capacity(chosen: Tensor, factor: float) -> Tensor:
    """``chosen [n, E]`` without the rows that come, in order, after an expert has taken ``factor`` times its even
    share, rounded up: a row that loses its expert passes the layer by (Fedus et al., section 2.2)."""
    capacity = math.ceil(factor * int(chosen.sum()) / chosen.shape[1])
    return chosen & (chosen.cumsum(0) <= capacity)
