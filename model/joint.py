"""Joint training of both ways to decode: mixed in full groups, and unmixed (T = 0) beside members held constant.

Some sequences of a batch run twice in one forward pass: once in their groups, once as copies that decode the way a
private request at temperature 0 does. A copy's rivals are other members of its group, detached: a fresh crowd every
step, so that no particular reference crowd is learnt by heart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.mixing import ExpertBank, WholeSequences, exact_products, of_layer

# Rows an expert takes, over what it would take if all won alike; the weakest wins beyond that are dropped.
_CAPACITY = 2.0


class JointSequences:
    """``mix`` for ``batch`` whole sequences followed by copies of the first ``copies`` of them.

    The mixed ones are grouped as in ``WholeSequences``; ``batch`` must be a multiple of G, so that every copy has
    ``rivals`` (None: G - 1). Fixed capacities keep all shapes constant, as a compiled graph wants them.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        copies: int,
        *,
        temperature: float | Tensor,
        rivals: int | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._mixed = WholeSequences(config, batch, temperature=temperature, watch=watch)
        self._batch, self._copies, self._size = batch, copies, config.group_size
        self._rival_count = config.group_size - 1 if rivals is None else rivals
        self._temperature = temperature

    def __call__(self, layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
        length = x.shape[0] // (self._batch + self._copies)
        mixed, copied = x[: self._batch * length], x[self._batch * length :]
        rivals = self._rivals(exact_products(mixed.detach(), bank.controller.detach()), length)
        return torch.cat((self._mixed(layer, bank, mixed), self._unmixed(layer, bank, copied, rivals)))

    def _rivals(self, scores: Tensor, length: int) -> Tensor:
        """``scores [batch * length, E]`` of the mixed rows to the best rival's score of each copy's row."""
        groups = scores.view(-1, self._size, length, scores.shape[1])
        best = groups.roll(-1, 1)  # each member's next one, in a circle
        for further in range(2, self._rival_count + 1):
            best = torch.maximum(best, groups.roll(-further, 1))
        return best.flatten(0, 1)[: self._copies].flatten(0, 1)

    def _unmixed(self, layer: int, bank: ExpertBank, x: Tensor, rivals: Tensor) -> Tensor:
        """Each row alone through the experts that it wins, with weight 1. The weight's gradient is that of the softmax
        between the row and its best rival (straight through)."""
        margin = exact_products(x, bank.controller) - rivals  # [n, E]
        count = margin.shape[0]
        capacity = min(count, int(_CAPACITY * count / (self._rival_count + 1)))
        rows = margin.detach().topk(capacity, dim=0).indices  # [capacity, E]
        won = margin.gather(0, rows)
        # Of those that won only: at a low temperature a clear loser's weight is 0, and 0 / 0 no number.
        soft = torch.sigmoid(won.clamp(min=0) / of_layer(self._temperature, layer))
        gate = (won.detach() > 0) * (soft / soft.detach())
        outputs = bank.experts(x[rows.t()]) * gate.t()[:, :, None]  # [E, capacity, D]
        return torch.zeros_like(x).index_add(0, rows.t().reshape(-1), outputs.flatten(0, 1).to(x.dtype))


def joint_losses(logits: Tensor, targets: Tensor, copies: int, *, distill: float) -> tuple[Tensor, Tensor, Tensor]:
    """``logits [batch + copies, length, V]`` and ``targets [batch, length]`` to three means in nats per token: the
    cross-entropy of the mixed sequences, that of the copies, and what the copies learn from: their cross-entropy with
    a target that is, by ``distill``, what the mixed mode predicted."""
    batch = targets.shape[0]
    mixed, copied = logits[:batch].float(), logits[batch:].float()
    loss = F.cross_entropy(mixed.flatten(0, 1), targets.flatten())
    predicted = F.log_softmax(copied, dim=-1)
    teacher = F.softmax(mixed[:copies].detach(), dim=-1)
    hard = F.nll_loss(predicted.flatten(0, 1), targets[:copies].flatten())
    soft = -(teacher * predicted).sum(-1).mean()
    return loss, hard, (1 - distill) * hard + distill * soft
