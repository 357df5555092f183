"""The list of experiments, and how one becomes a file of results."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.errors import TrainingError
from model.experiments.crowds import crowds
from model.experiments.distance import distance
from model.experiments.learnable import learnable
from model.experiments.private import private_temperature
from model.experiments.sizes import group_size
from model.experiments.steps import kinds, steps
from model.experiments.suite import Suite
from model.files import write_json


@dataclass(frozen=True)
class Experiment:
    """``measure`` gives ``rows``, a dictionary a point, and a ``summary``."""

    name: str
    question: str
    measure: Callable[[Suite], dict[str, Any]]


EXPERIMENTS = (
    Experiment("steps", "In how many steps, and how fast, does MoT reach dense's final loss at equal FLOPs?", steps),
    Experiment("kinds", "The same against Switch and Expert Choice", kinds),
    Experiment("learnable", "Does a learnt temperature fall, and what does it cost?", learnable),
    Experiment("group-size", "How large must a group be at evaluation, and what may complete it?", group_size),
    Experiment("distance", "How far apart may the positions of a group's members be?", distance),
    Experiment("private-temperature", "What does private decoding cost from T = 1 to 0?", private_temperature),
    Experiment("crowds", "How many reference crowds are needed, and how large?", crowds),
)


def experiments_named(name: str) -> tuple[Experiment, ...]:
    """One, or ``all``. Raises TrainingError for another name."""
    found = tuple(experiment for experiment in EXPERIMENTS if name in (experiment.name, "all"))
    if not found:
        names = ", ".join(experiment.name for experiment in EXPERIMENTS)
        raise TrainingError(f"experiment must be one of {names} or all, not {name!r}")
    return found


def run(experiment: Experiment, suite: Suite) -> dict[str, Any]:
    """Measure, and write ``NAME.json`` into the suite's folder, whole or not at all."""
    result = {
        "experiment": experiment.name,
        "question": experiment.question,
        "scale": suite.scale.name,
        "seeds": suite.seeds,
        "machine": machine(),
        **experiment.measure(suite),
    }
    write_json(suite.folder / f"{experiment.name}.json", result)
    return result


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
