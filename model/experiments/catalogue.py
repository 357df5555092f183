"""Every run of the suite, by what it is for. Experiments ask here, so that the same run is the same everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.experiments.runs import Run
from model.experiments.scales import Scale
from model.kinds import flop_matched


class Catalogue:
    def __init__(self, scale: Scale) -> None:
        self._scale = scale

    def kind(self, kind: str, seed: int = 0, *, share: float = 1.0) -> Run:
        """The scale's model with that kind of feed-forward layer; ``share`` of the steps, with a schedule of its own.
        MoT is annealed at the end, as the trainer does by default."""
        scale = self._scale
        settings = dataclasses.replace(
            scale.settings,
            seed=seed,
            learning_rate=scale.rates.get(kind, scale.settings.learning_rate),
            steps=round(scale.settings.steps * share),
        )
        name = f"{kind}-{seed}" if share == 1 else f"{kind}-{seed}-{share:g}"
        return Run(name, flop_matched(scale.config, kind), settings)

    def mixing(self, seed: int = 0, *, share: float = 1.0) -> Run:
        """MoT for mixing alone: temperatures are learnt by layer from the start, which mixes best of all ways (c) and
        does nothing for private decoding."""
        run = self.kind("mot", seed, share=share)
        return run.but(run.name.replace("mot", "mot-mixing"), temperature_mode="learnable")

    def tempered(self, name: str, **temperature: Any) -> Run:
        """MoT, seed 0, with another treatment of the temperature (settings of ``temperature_mode`` and its kin)."""
        return self.kind("mot").but(name, **temperature)

    def unannealed(self) -> Run:
        return self.tempered("mot-fixed", temperature_mode="fixed")

    def private(self) -> Run:
        """Where (f) begins: the annealed MoT run in larger batches."""
        return self.kind("mot").but("mot-private", batch=self._scale.private_batch)

    def private_unannealed(self) -> Run:
        """Its twin of constant temperature."""
        return self.private().but("mot-private-fixed", temperature_mode="fixed")

    def never_annealed(self) -> Run:
        """The twin after as many steps as a transition makes in all: mixing that nothing was done to for privacy."""
        return self._transition("never annealed", self.private_unannealed(), {})

    def learnt_throughout(self) -> Run:
        """The same with temperatures learnt by layer from the start."""
        learnt = {"temperature_mode": "learnable"}
        return self._transition("learnt throughout", self.private().but("mot-private-learnt", **learnt), learnt)

    def joint_from_the_start(self) -> Run:
        """What transition tuning saves: all steps of (f)'s start and its control, jointly."""
        start = self.private()
        return start.but(
            "mot-joint",
            steps=start.settings.steps + self._scale.transition_steps,
            joint_copies=start.settings.batch // 4,
            joint_rivals=start.config.group_size // 2 + 1,
        )

    def transitions(self) -> dict[str, Run]:
        """Ways to go on from (f)'s start so that it can decode unmixed, and the control that just goes on."""
        start = self.private()
        final = start.settings.final_temperature
        assert isinstance(final, float), "one for all layers"
        layers, some = start.config.n_layer, start.settings.batch // 4
        colder = {"temperature_mode": "scheduled", "anneal_from": 0.0, "final_temperature": final / 4}
        half = start.config.group_size // 2  # and one more: a little over half of all rivals
        ways: dict[str, dict[str, Any]] = {
            "control": {},
            "anneal": colder,
            "anneal but layer 1": {**colder, "final_temperature": (final,) + (final / 4,) * (layers - 1)},
            "learn by layer": {"temperature_mode": "learnable"},
            "joint": {"joint_copies": some},
            "joint, light": {"joint_copies": some, "joint_weight": 0.1},
            "joint, heavy": {"joint_copies": 2 * some, "joint_weight": 1.0},
            "joint, no teacher": {"joint_copies": some, "joint_distill": 0.0},
            "joint, teacher only": {"joint_copies": some, "joint_distill": 1.0},
            "joint, fewer rivals": {"joint_copies": some, "joint_rivals": half + 1},
            "joint and anneal": {"joint_copies": some, "joint_rivals": half + 1, **colder},
        }
        return {name: self._transition(name, start, changes) for name, changes in ways.items()}

    def _transition(self, name: str, start: Run, changes: dict[str, Any]) -> Run:
        """The temperature stays as it ended unless ``changes`` say otherwise."""
        settings = dataclasses.replace(
            start.settings,
            seed=1000,  # other data than the start has seen
            steps=self._scale.transition_steps,
            learning_rate=start.settings.learning_rate * self._scale.transition_rate,
        )
        settings = dataclasses.replace(settings, **{"temperature_mode": "fixed", **changes})
        return Run(name.replace(",", "").replace(" ", "-"), start.config, settings, start)
