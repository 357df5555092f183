"""How to train: the settings of a run, and presets of a model with its settings. Knows no tensors and no text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from model.config import ModelConfig
from model.errors import TrainingError
from model.kinds import flop_matched
from model.shapes import DEMO, MOT_MEDIUM, PAPER, TINY

OptimizerName = Literal["adamw", "muon"]
TemperatureMode = Literal["fixed", "scheduled", "learnable"]
LearnTemperature = Literal["layer", "expert"]
ExportType = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class TrainSettings:
    """One run. Lengths are in tokens; a step sees ``batch`` windows of ``length`` tokens.

    ``accumulate``: the batch (with several processes, each one's part) is computed in so many micro-batches whose
    gradients are averaged. Groups are formed inside a micro-batch; so are the unmixed copies, Switch's capacity and
    the balance loss. Without those the step is that of the unsplit batch, up to rounding.

    ``temperature_mode`` (MoT only; ``model.temperatures`` has the equations): ``fixed`` at the configuration's;
    ``scheduled``: so until ``anneal_from`` of the steps are done, then falling geometrically to ``final_temperature``,
    one for all layers or one a layer (a sharper softmax is cheaper to decode privately); ``learnable``, one a layer or
    one an expert of each layer, fixed until ``learn_from`` of the steps are done.
    """

    steps: int = 3000
    batch: int = 16
    length: int = 256
    accumulate: int = 1
    optimizer: OptimizerName = "adamw"  # muon: weight matrices by Muon, the rest by AdamW
    learning_rate: float = 2e-3  # the peak
    matrix_rate: float = 2.0  # Muon's rate over AdamW's
    final_rate_fraction: float = 0.1  # of the peak, which the cosine ends at
    warmup: int = 100  # steps of rising rate
    weight_decay: float = 0.05  # of matrices
    clip: float = 1.0  # largest norm of all gradients together
    temperature_mode: TemperatureMode = "scheduled"
    final_temperature: float | tuple[float, ...] = 0.1
    anneal_from: float = 0.6
    learn_temperature: LearnTemperature = "layer"
    learn_from: float = 0.0
    temperature_rate: float = 1.0  # rate of a learnt temperature's logarithm over that of AdamW's parameters
    balance_weight: float | None = None  # of token choice's balance loss, summed over layers; None: 0.01
    capacity_factor: float | None = None  # of switch, see model/token_choice.py; None: 1.25
    joint_copies: int = 0  # sequences of a step that also decode unmixed, see model/joint.py
    joint_weight: float = 0.35  # of the copies' loss
    joint_distill: float = 0.5  # share of the mixed mode's prediction in the copies' target
    joint_rivals: int | None = None  # members of its group that a copy must beat; None: all the others
    seed: int = 0
    autocast: bool = False
    compile: bool = False
    save_every: int = 200
    eval_every: int = 200  # steps between evaluations, where there is held-out text
    eval_windows: int = 96  # of that text, rounded up to full groups
    export_dtype: ExportType = "bfloat16"  # of the checkpoint's weights
    shard_bytes: int | None = None  # largest file of the checkpoint's weights; None: one file

    def check(self, config: ModelConfig, processes: int = 1) -> None:
        """Raises TrainingError naming the setting and the reason. ``processes`` train together."""
        self._check_types()
        self._check_batch(config, processes)
        for name in ("learning_rate", "matrix_rate", "clip", "temperature_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TrainingError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise TrainingError(f"weight_decay must not be negative, not {self.weight_decay}")
        if not 0 <= self.warmup <= self.steps:
            raise TrainingError(f"warmup ({self.warmup}) must lie between 0 and steps ({self.steps})")
        for name in ("anneal_from", "learn_from", "final_rate_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} ({getattr(self, name)}) must lie between 0 and 1")
        if self.seed < 0:
            raise TrainingError(f"seed must not be negative, not {self.seed}")
        self._check_temperature(config)
        self._check_joint(config, processes)
        self._check_token_choice(config)

    def _check_types(self) -> None:
        for name, choices in (
            ("optimizer", OptimizerName),
            ("temperature_mode", TemperatureMode),
            ("learn_temperature", LearnTemperature),
            ("export_dtype", ExportType),
        ):
            if getattr(self, name) not in get_args(choices):
                raise TrainingError(f"{name} must be {' or '.join(get_args(choices))}, not {getattr(self, name)!r}")
        counts = ("steps", "batch", "length", "accumulate", "save_every", "eval_every", "eval_windows", "shard_bytes")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainingError(f"{name} must be at least 1, not {value}")

    def _check_batch(self, config: ModelConfig, processes: int) -> None:
        if self.length > config.n_positions:
            raise TrainingError(f"length ({self.length}) exceeds the model's n_positions ({config.n_positions})")
        parts = processes * self.accumulate
        if self.batch % parts:
            raise TrainingError(
                f"batch ({self.batch}) must be a multiple of accumulate ({self.accumulate}) times the number of "
                f"processes ({processes})"
            )
        if config.is_grouped and self.batch % (parts * config.group_size):
            times = f" times accumulate ({self.accumulate}) times processes ({processes})" if parts > 1 else ""
            raise TrainingError(
                f"batch ({self.batch}) must be a multiple of group_size ({config.group_size}){times}: "
                f"a group is filled with sequences of the {'micro-' if parts > 1 else ''}batch"
            )

    def _check_temperature(self, config: ModelConfig) -> None:
        if not config.is_mot:
            return  # there is none to choose
        if config.temperature == 0:
            raise TrainingError("temperature: a mot model at temperature 0 has no gradient for its controllers")
        if self.temperature_mode == "learnable":
            if config.emit_softmax_over_experts or config.use_discrete_routing:
                raise TrainingError(
                    "temperature_mode: learnable only for a mot model with one softmax over tokens, not with "
                    "emit_softmax_over_experts or use_discrete_routing"
                )
            return
        finals = self.final_temperatures(config.n_layer)
        if len(finals) != config.n_layer:
            raise TrainingError(f"final_temperature: {len(finals)} values for {config.n_layer} layers")
        if self.temperature_mode == "scheduled" and not all(0 < final <= config.temperature for final in finals):
            raise TrainingError(
                f"final_temperature ({self.final_temperature}) must lie above 0 and not above the starting "
                f"temperature ({config.temperature})"
            )

    def _check_joint(self, config: ModelConfig, processes: int) -> None:
        if not 0 <= self.joint_copies <= self.batch:
            raise TrainingError(f"joint_copies ({self.joint_copies}) must lie between 0 and batch ({self.batch})")
        if self.joint_copies % (processes * self.accumulate):
            raise TrainingError(
                f"joint_copies ({self.joint_copies}) must be a multiple of accumulate ({self.accumulate}) times the "
                f"number of processes ({processes})"
            )
        if self.joint_copies and (not config.is_mot or config.emit_softmax_over_experts or config.use_discrete_routing):
            raise TrainingError("joint_copies: only for a mot model with one softmax over tokens")
        if self.joint_copies and config.group_size < 2:
            raise TrainingError("joint_copies: a copy needs rivals, and group_size is 1")
        if not (0 <= self.joint_weight < float("inf") and 0 <= self.joint_distill <= 1):
            raise TrainingError("joint_weight must not be negative and joint_distill must lie between 0 and 1")
        if self.joint_rivals is not None and not 1 <= self.joint_rivals < config.group_size:
            raise TrainingError(
                f"joint_rivals ({self.joint_rivals}) must lie between 1 and group_size - 1 ({config.group_size - 1})"
            )

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

    def final_temperatures(self, layers: int) -> tuple[float, ...]:
        """One a layer."""
        final = self.final_temperature
        return final if isinstance(final, tuple) else (final,) * layers

    def temperatures(self, step: int, start: float, layers: int) -> tuple[float, ...]:
        """Each layer's at a step counted from 0, before what is learnt."""
        done = (step / self.steps - self.anneal_from) / max(1e-9, 1 - self.anneal_from)
        if self.temperature_mode != "scheduled" or done <= 0 or self.anneal_from >= 1:
            return (start,) * layers
        share = min(1.0, done * 1.1)  # the last tenth stays at the end
        return tuple(start * (final / start) ** share for final in self.final_temperatures(layers))

    def learns_temperature(self, step: int) -> bool:
        return self.temperature_mode == "learnable" and step >= self.learn_from * self.steps


_PRESETS: dict[str, tuple[ModelConfig, TrainSettings]] = {
    "tiny": (TINY, TrainSettings(steps=50, batch=8, length=64, warmup=10, save_every=25)),
    "demo": (
        DEMO,
        TrainSettings(
            steps=1900, optimizer="muon", learning_rate=3e-3, matrix_rate=1.5, warmup=60, final_rate_fraction=0.03,
            save_every=100, compile=True,
        ),
    ),
    "paper": (
        PAPER,
        TrainSettings(
            steps=250_000, batch=256, accumulate=8, warmup=2500, temperature_mode="fixed", save_every=1000,
            eval_every=1000, autocast=True, compile=True,
        ),
    ),
    "mot-medium": (
        MOT_MEDIUM,
        TrainSettings(
            steps=250_000, batch=256, accumulate=8, learning_rate=1e-3, warmup=2500, save_every=1000, eval_every=1000,
            autocast=True, compile=True, shard_bytes=2 * 10**9,
        ),
    ),
}  # fmt: skip
PRESETS = tuple(_PRESETS)
# Fields of a preset's configuration that a run may change, the public ones of ``config.json``.
SHAPE = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "group_size", "n_expert", "expert_size", "temperature",
)  # fmt: skip
_DENSE_PAPER_RATE = 4e-3


def preset_named(
    name: str,
    changes: dict[str, Any],
    *,
    shape: dict[str, Any] | None = None,
    feed_forward: str = "mot",
    start: ModelConfig | None = None,
) -> tuple[ModelConfig, TrainSettings]:
    """A model and how to train it, with some settings changed; ``shape``: fields of the MoT configuration to change,
    among ``SHAPE``, before another kind of layer is matched to it.

    - ``tiny`` is done in seconds.
    - ``demo``: the bundled checkpoint's shape.
    - ``paper``: the small model of Antoniak et al. (arXiv 2310.15961), at their peak rates: 2e-3 for MoT, 4e-3 for
      dense.
    - ``mot-medium``: the published checkpoint's shape. Its rate is ours, not the authors'.

    ``feed_forward`` puts another kind of layer in, at equal FLOPs (see ``kinds.flop_matched``); ``start``: the
    configuration of a checkpoint that training begins with, which then takes the preset's place: of its shape only
    what no weight depends on can change. Raises TrainingError for another name, for sizes that make no model and for a
    change that nothing would use.
    """
    if name not in _PRESETS:
        raise TrainingError(f"preset must be one of {', '.join(_PRESETS)}, not {name!r}")
    config, settings = _PRESETS[name]
    config = _shaped(config, shape or {}, feed_forward, start)
    if name == "paper" and feed_forward == "dense":
        settings = dataclasses.replace(settings, learning_rate=_DENSE_PAPER_RATE)
    if config.is_token_choice:
        settings = dataclasses.replace(settings, compile=False)  # little is gained where rows are sorted by data
    settings = dataclasses.replace(settings, **changes)
    for setting, reason in _unused(settings, config):
        if setting in changes:
            raise TrainingError(f"{setting}: {reason}")
    return config, dataclasses.replace(settings, warmup=min(settings.warmup, settings.steps))


def _shaped(preset: ModelConfig, shape: dict[str, Any], feed_forward: str, start: ModelConfig | None) -> ModelConfig:
    """The configuration to train, with its sizes changed. Raises TrainingError naming the field."""
    kind = feed_forward if start is None else start.model_type
    if "temperature" in shape and kind != "mot":
        raise TrainingError(f"temperature: a {kind} model has no temperature to change")
    if "group_size" in shape and start is not None and not start.is_grouped:
        raise TrainingError(f"group_size: a {kind} model has no groups")
    for field in shape:
        if start is not None and field not in ("group_size", "temperature"):
            raise TrainingError(f"{field}: start_from's checkpoint has its own")
    if shape.get("expert_size", 1) < 1:
        raise TrainingError(f"expert_size must be at least 1, not {shape['expert_size']}")
    try:
        return start.replace(**shape) if start is not None else flop_matched(preset.replace(**shape), feed_forward)
    except ValueError as error:
        raise TrainingError(str(error)) from error


def _unused(settings: TrainSettings, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Settings that would have no effect, each with the reason."""
    scheduled, learnt = ("final_temperature", "anneal_from"), ("learn_temperature", "learn_from", "temperature_rate")
    if not config.is_mot:
        for name in ("temperature_mode", *scheduled, *learnt):
            yield name, f"a {config.model_type} model has no temperature to change"
    if settings.temperature_mode != "scheduled":
        for name in scheduled:
            yield name, f"only with temperature_mode scheduled, not {settings.temperature_mode}"
    if settings.temperature_mode != "learnable":
        for name in learnt:
            yield name, f"only with temperature_mode learnable, not {settings.temperature_mode}"
    if settings.optimizer != "muon":
        yield "matrix_rate", f"only with optimizer muon, not {settings.optimizer}"
    if not settings.joint_copies:
        for name in ("joint_weight", "joint_distill", "joint_rivals"):
            yield name, "only with joint_copies"
