"""The mixing temperatures of a training run, and how they become a checkpoint's one.

For layer l and expert e, ``S[l]`` being the schedule's or the fixed temperature:

    T[l,e] = S[l]                   fixed, scheduled
    T[l,e] = S[l] exp(f[l])         learnable, one a layer: f is learnt, from 0 on
    T[l,e] = S[l] exp(f[l,e])       learnable, one an expert

Antoniak et al. (arXiv 2310.15961) let the temperature be learnt, and tune it down so that tokens can be decoded
without mixing; the logarithm keeps it above 0. Knows nothing of optimizers and files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.recipe import TrainSettings
from model.transformer import Transformer


class Temperatures(nn.Module):
    """``at(step)`` is the table ``T [layers, 1 or E]`` of a step counted from 0, in float64, with gradients where it is
    learnable. Models that do not mix have their configuration's temperature throughout."""

    def __init__(self, config: ModelConfig, settings: TrainSettings) -> None:
        super().__init__()
        self._config, self._settings = config, settings
        self.log_factors: nn.Parameter | None = None
        if config.is_mot and settings.temperature_mode == "learnable":
            columns = config.n_expert if settings.learn_temperature == "expert" else 1
            self.log_factors = nn.Parameter(torch.zeros(config.n_layer, columns))

    def at(self, step: int) -> Tensor:
        config = self._config
        by_layer = (config.temperature,) * config.n_layer
        if config.is_mot:
            by_layer = self._settings.temperatures(step, config.temperature, config.n_layer)
        table = torch.tensor(by_layer, dtype=torch.float64)[:, None]
        if self.log_factors is None:
            return table
        return table.to(self.log_factors.device) * self.log_factors.double().exp()


def overall(table: Tensor) -> float:
    """The one temperature that stands for ``table [layers, 1 or E]``: the geometric mean."""
    lowest, highest = table.aminmax()
    return float(lowest if lowest == highest else table.log().mean().exp())


@contextlib.contextmanager
@torch.no_grad()
def folded(model: Transformer, table: Tensor) -> Iterator[None]:
    """Meanwhile the model is what a checkpoint of it holds: one temperature T, the overall one, and controllers that
    make up for it. With one softmax over tokens this changes nothing but rounding:

        s[t,e] / T[l,e] = x_t . (controller[:,e] T / T[l,e]) / T

    and a request's private temperature, which takes T's place, scales all temperatures alike. (A softmax over experts
    too is left the same as long as ``T[l,e]`` is the same for all e.)
    """
    config, temperature = model.config, overall(table)
    controllers = [bank.controller.clone() for bank in model.banks]
    try:
        model.config = config.replace(temperature=temperature)
        if (table != temperature).any():  # dense models have none
            for bank, row in zip(model.banks, table, strict=True):
                bank.controller.mul_((temperature / row).to(bank.controller))
        yield
    finally:
        model.config = config
        for bank, kept in zip(model.banks, controllers, strict=True):
            bank.controller.copy_(kept)
