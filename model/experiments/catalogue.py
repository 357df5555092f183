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
        """Where (f) begins: a model for mixing alone, temperatures learnt by layer throughout, in larger batches."""
        return self.kind("mot").but("mot-private", batch=self._scale.private_batch, temperature_mode="learnable")

    def private_annealed(self) -> Run:
        """Its twin that is annealed while it trains, for as many steps as a transition makes in all, from about the
        temperature that the other one learns: early and not far, which costs mixing nothing."""
        start, warm = self.private(), self._scale.private_temperature
        settings = dataclasses.replace(
            start.settings,
            steps=start.settings.steps + self._scale.transition_steps,
            temperature_mode="scheduled",
            anneal_from=0.3,
            final_temperature=0.04,
        )
        return Run("mot-private-annealed", start.config.replace(temperature=warm), settings)

    def transitions(self) -> dict[str, Run]:
        """Ways to go on from (f)'s start so that it can decode unmixed, and the control that just goes on."""
        start = self.private()
        some = start.settings.batch // 4
        cold, colder = (
            {"temperature_mode": "scheduled", "anneal_from": 0.0, "final_temperature": final}
            for final in (start.config.temperature, start.settings.final_temperature)
        )
        ways: dict[str, dict[str, Any]] = {
            "control": {"temperature_mode": "learnable"},
            "anneal": cold,
            "anneal further": colder,
            "joint": {"joint_copies": some},
            "joint, light": {"joint_copies": some, "joint_weight": 0.1},
            "joint, heavy": {"joint_copies": 2 * some, "joint_weight": 1.0},
            "joint, heavy, and anneal": {"joint_copies": 2 * some, "joint_weight": 1.0, **cold},
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
