"""What a step minimises: the cross-entropy of some windows and what is added to it, with the figures to report.

Knows one forward pass of the model; nothing of steps, optimizers or files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import attend_whole_sequences
from model.config import ModelConfig
from model.joint import JointSequences, joint_losses
from model.mixing import ExpertBank, WholeSequences, mixing_entropy
from model.recipe import TrainSettings
from model.token_choice import TrainedTokenChoice
from model.transformer import Mix, Transformer


class Figures(NamedTuple):
    """Of one micro-batch, scalars; losses are means in nats per token."""

    minimised: Tensor  # what the gradients are of: ``loss`` and all that is added to it
    loss: Tensor  # cross-entropy of the windows, mixed as the kind of model does
    private_loss: Tensor  # cross-entropy of the copies that decode unmixed (``model.joint``); 0 without copies
    balance: Tensor  # token choice's balance loss, mean over layers: about 1 when even; 0 for other kinds
    mixing_entropy: Tensor  # of MoT's mixing weights, mean over groups, experts and layers, over log G; else 0


def _apply(choice: TrainedTokenChoice, layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
    return choice(layer, bank, x)


class Objective:
    """Called with ``ids [batch, length + 1]`` and ``temperatures [layers, 1 or E]``. The first ``copies`` windows are
    also decoded unmixed. All shapes are constant, as a compiled graph wants them."""

    def __init__(
        self, model: Transformer, settings: TrainSettings, *, batch: int, copies: int, device: torch.device
    ) -> None:
        self._model, self._settings = model, settings
        self._batch, self._copies = batch, copies
        self._positions = torch.arange(settings.length, device=device).repeat(batch + copies)
        self._compute: Callable[[Tensor, Tensor], Figures] = (
            torch.compile(self._plain) if settings.compile else self._plain
        )
        # How many rows an expert has is data, which no compiled graph may depend on.
        self._choose: Callable[..., Tensor] = _apply
        if settings.compile:
            self._choose = torch.compiler.disable(_apply)  # type: ignore[no-untyped-call]

    def __call__(self, ids: Tensor, temperatures: Tensor) -> Figures:
        return self._compute(ids, temperatures)

    def _plain(self, ids: Tensor, temperatures: Tensor) -> Figures:
        config, settings, rows = self._model.config, self._settings, self._batch + self._copies
        inputs, targets = ids[:, :-1], ids[:, 1:]
        if self._copies:
            inputs = torch.cat((inputs, inputs[: self._copies]))
        weight, capacity_factor = settings.token_choice(config)
        choice = TrainedTokenChoice(capacity_factor)
        entropies: list[Tensor] = []
        mix = self._mix(choice, temperatures, lambda merge: entropies.append(mixing_entropy(merge.detach()).mean()))
        hidden = self._model(
            inputs.reshape(-1),
            self._positions,
            lambda layer, qkv: attend_whole_sequences(qkv, rows, config.n_head),
            mix,
        )
        logits = self._model.logits(hidden)
        private = balance = entropy = logits.new_zeros((), dtype=torch.float32)
        if self._copies:
            loss, private, copied = joint_losses(
                logits.view(rows, settings.length, -1), targets, self._copies, distill=settings.joint_distill
            )
            minimised = loss + settings.joint_weight * copied
        else:
            minimised = loss = F.cross_entropy(logits.float(), targets.reshape(-1))
        if choice.balance:
            layers = torch.stack(choice.balance)
            minimised, balance = minimised + weight * layers.sum(), layers.mean()
        if entropies:
            entropy = torch.stack(entropies).float().mean()
        return Figures(minimised, loss, private, balance, entropy)

    def _mix(self, choice: TrainedTokenChoice, temperatures: Tensor, watch: Callable[[Tensor], None]) -> Mix:
        config: ModelConfig = self._model.config
        if not config.is_grouped:
            return functools.partial(self._choose, choice)
        seen = watch if config.is_mot else None
        if self._copies:
            return JointSequences(
                config, self._batch, self._copies,
                temperature=temperatures, rivals=self._settings.joint_rivals, watch=seen,
            )  # fmt: skip
        return WholeSequences(config, self._batch, temperature=temperatures, watch=seen)
