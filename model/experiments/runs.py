"""What is trained: a run is its model, its settings and what it starts from, and its folder's name follows from them.

So two experiments that need the same run share it, and a changed run never meets the folder of the old one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig
from model.recipe import TrainSettings


@dataclass(frozen=True)
class Run:
    """``start``: the run whose checkpoint this one goes on from; its model is then the same but for the temperature."""

    name: str
    config: ModelConfig
    settings: TrainSettings
    start: Run | None = None

    @property
    def digest(self) -> str:
        """Of all that changes the weights that come out. Settings that stand at their default do not count, so that
        a new one does not part a suite from its runs."""
        parts: dict[str, Any] = {
            "config": _changed(self.config),
            "settings": _changed(self.settings),
            "start": self.start.digest if self.start else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.digest}"

    def but(self, name: str, **settings: Any) -> Run:
        """The same run with some settings changed."""
        return Run(name, self.config, dataclasses.replace(self.settings, **settings), self.start)


def _changed(values: ModelConfig | TrainSettings) -> dict[str, Any]:
    defaults = dataclasses.asdict(type(values)())
    return {name: value for name, value in dataclasses.asdict(values).items() if value != defaults[name]}
