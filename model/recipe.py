"""How to train: the settings of a run, and presets of a model with its settings. Knows no tensors and no text."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from model.config import ModelConfig
from model.errors import TrainingError
from model.kinds import flop_matched


@dataclass(frozen=True)
class TrainSettings:
    """One run. Lengths are in tokens; the batch is ``batch`` windows of ``length`` tokens a step.

    The temperature stays at the configuration's until ``anneal_from`` of the steps are done, then falls
    geometrically to ``final_temperature`` (DESIGN of the layer: a sharper softmax is cheaper to decode privately).
    """

    steps: int = 3000
    batch: int = 16
    length: int = 256
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: weight matrices by Muon, the rest by AdamW
    learning_rate: float = 2e-3
    matrix_rate: float = 2.0  # Muon's rate over AdamW's
    final_rate_fraction: float = 0.1
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    final_temperature: float = 0.1
    anneal_from: float = 0.6
    balance_weight: float | None = None  # of token choice's balance loss, summed over layers; None: 0.01
    capacity_factor: float | None = None  # of switch, see model/token_choice.py; None: 1.25
    joint_copies: int = 0  # sequences of a step that also decode unmixed, see model/joint.py
    joint_weight: float = 0.35  # of the copies' loss
    joint_distill: float = 0.5  # share of the mixed mode's prediction in the copies' target
    seed: int = 0
    save_every: int = 200
    autocast: bool = False
    compile: bool = False

    def check(self, config: ModelConfig) -> None:
        """Raises TrainingError naming the setting and the reason."""
        for name in ("steps", "batch", "length", "save_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.length > config.n_positions:
            raise TrainingError(f"length ({self.length}) exceeds the model's n_positions ({config.n_positions})")
        if config.is_grouped and self.batch % config.group_size:
            raise TrainingError(
                f"batch ({self.batch}) must be a multiple of group_size ({config.group_size}): "
                "a group is filled with sequences of the batch"
            )
        for name in ("learning_rate", "matrix_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TrainingError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.optimizer not in ("adamw", "muon"):
            raise TrainingError(f"optimizer must be adamw or muon, not {self.optimizer}")
        if not 0 <= self.warmup <= self.steps:
            raise TrainingError(f"warmup ({self.warmup}) must lie between 0 and steps ({self.steps})")
        if not 0 <= self.anneal_from <= 1:
            raise TrainingError(f"anneal_from ({self.anneal_from}) must lie between 0 and 1")
        if not 0 <= self.joint_copies <= self.batch:
            raise TrainingError(f"joint_copies ({self.joint_copies}) must lie between 0 and batch ({self.batch})")
        if self.joint_copies and (not config.is_mot or config.emit_softmax_over_experts or config.use_discrete_routing):
            raise TrainingError("joint_copies: only for a mot model with one softmax over tokens")
        if not (0 <= self.joint_weight < float("inf") and 0 <= self.joint_distill <= 1):
            raise TrainingError("joint_weight must not be negative and joint_distill must lie between 0 and 1")
        if config.is_mot and not 0 < self.final_temperature <= config.temperature:
            raise TrainingError(
                f"final_temperature ({self.final_temperature}) must lie above 0 and not above the starting "
                f"temperature ({config.temperature})"
            )
        self._check_token_choice(config)

    def _check_token_choice(self, config: ModelConfig) -> None:
        for name, value, kinds, least in (
            ("balance_weight", self.balance_weight, ("switch", "top-k"), 0.0),
            ("capacity_factor", self.capacity_factor, ("switch",), 1e-3),
        ):
            if value is not None and config.model_type not in kinds:
                raise TrainingError(f"{name}: only for {' and '.join(kinds)}, not for a {config.model_type} model")
            if value is not None and not least <= value < float("inf"):
                raise TrainingError(f"{name} must be at least {least}, not {value}")

    def token_choice(self, config: ModelConfig) -> tuple[float, float | None]:
        """Weight of the balance loss and capacity factor, None for no limit: DeepSeekMoE drops no token in training
        either. Defaults are those of the papers' experiments."""
        weight = 0.01 if self.balance_weight is None else self.balance_weight
        if config.model_type != "switch":
            return weight, None
        return weight, 1.25 if self.capacity_factor is None else self.capacity_factor

    def rate(self, step: int) -> float:
        """Learning rate of a step counted from 0: linear warm-up, then cosine to the final fraction."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        floor = self.final_rate_fraction
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

    def temperature(self, step: int, start: float) -> float:
        done = (step / self.steps - self.anneal_from) / max(1e-9, 1 - self.anneal_from)
        if done <= 0 or self.anneal_from >= 1:
            return start
        return float(
            start * (self.final_temperature / start) ** min(1.0, done * 1.1)
        )  # the last tenth stays at the end


def preset_named(name: str, changes: dict[str, Any], *, feed_forward: str = "mot") -> tuple[ModelConfig, TrainSettings]:
    """A model and how to train it, with some settings changed. ``demo`` is the bundled checkpoint's recipe: 16 times
    the feed-forward parameters of the dense model with the same FLOPs; ``tiny`` is done in seconds. ``feed_forward``
    puts another kind of layer in, at equal FLOPs (see ``kinds.flop_matched``). Raises TrainingError for another
    name and for a change that the kind has no use for."""
    if name == "demo":
        config = ModelConfig(
            vocab_size=4096,
            n_positions=256,
            n_embd=256,
            n_layer=4,
            n_head=8,
            group_size=16,
            n_expert=64,
            expert_size=72,
        )
        settings = TrainSettings(
            steps=1900, optimizer="muon", learning_rate=3e-3, matrix_rate=1.5, warmup=60, final_rate_fraction=0.03,
            save_every=100, compile=True,
        )  # fmt: skip
    elif name == "tiny":
        config = ModelConfig(
            vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=4, group_size=4, n_expert=8, expert_size=32
        )
        settings = TrainSettings(steps=50, batch=8, length=64, warmup=10, save_every=25)
    else:
        raise TrainingError(f"preset must be demo or tiny, not {name!r}")
    config = flop_matched(config, feed_forward)
    if "final_temperature" in changes and not config.is_mot:
        raise TrainingError(f"final_temperature: a {feed_forward} model has no temperature to anneal")
    if config.is_token_choice:
        settings = dataclasses.replace(settings, compile=False)  # little is gained where rows are sorted by data
    settings = dataclasses.replace(settings, **changes)
    return config, dataclasses.replace(settings, warmup=min(settings.warmup, settings.steps))
