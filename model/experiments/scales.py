"""How large the experiments are: one small model, how each kind is trained, and how much text judges it."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.config import ModelConfig
from model.errors import TrainingError
from model.recipe import TrainSettings


@dataclass(frozen=True)
class Scale:
    """``config`` is the MoT model from which the others are FLOP-matched. ``rates``: peak learning rates, tuned by
    kind, because what suits one kind is no fair choice for another; kinds not named take the settings'.

    Its dense twin has feed-forward layers as wide as the model, narrow ones: where these are the bottleneck, what more
    parameters are worth shows in a run of two minutes. Experts are more than the model is wide, as the paper's are:
    the finer they are, the sooner they learn (docs/results.md). MoT starts at T = 0.05, not 1: with
    controllers as small as they begin, T = 1 mixes all alike, and hundreds of steps pass before that changes.

    The runs for private decoding have four groups a position, so that experts see enough tokens to tell them apart, and
    mix best at the temperature that is learnt there (docs/results.md)."""

    name: str
    config: ModelConfig
    settings: TrainSettings
    private_batch: int  # sequences a step of the runs of (f): several groups a position
    private_temperature: float  # at which those that do not learn theirs begin
    transition_steps: int  # of a run that goes on from a finished one
    transition_rate: float  # its peak learning rate over that of the run that it goes on from
    windows: int  # of validation text, a multiple of four groups
    curve_every: int  # steps between points of a validation curve
    rates: dict[str, float] = field(default_factory=dict)


def scale_named(name: str) -> Scale:
    """``small``: what docs/results.md shows, two or three minutes a run on one core; ``tiny``: seconds for all, for a
    try. Raises TrainingError for another name."""
    if name == "small":
        return Scale(
            name,
            ModelConfig(
                vocab_size=1024, n_positions=64, n_embd=96, n_layer=2, n_head=4,
                group_size=16, n_expert=256, expert_size=6, temperature=0.05,
            ),
            TrainSettings(
                steps=1200, batch=16, length=64, warmup=50, learning_rate=5e-3, final_temperature=0.02, save_every=100
            ),
            private_batch=64,
            private_temperature=0.3,
            transition_steps=300,
            transition_rate=0.5,
            windows=256,
            curve_every=50,
        )  # fmt: skip
    if name == "tiny":
        return Scale(
            name,
            ModelConfig(
                vocab_size=300, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                group_size=4, n_expert=8, expert_size=8, temperature=0.05,
            ),
            TrainSettings(
                steps=12, batch=8, length=16, warmup=2, learning_rate=4e-3, final_temperature=0.02, save_every=5
            ),
            private_batch=16,
            private_temperature=0.3,
            transition_steps=6,
            transition_rate=0.5,
            windows=16,
            curve_every=4,
        )  # fmt: skip
    raise TrainingError(f"scale must be small or tiny, not {name!r}")
