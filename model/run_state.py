"""A run's folder: its state, which appears whole or not at all, and its log. Knows nothing of training."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.errors import TrainingError
from model.files import whole
from model.recipe import TrainSettings

STATE = "state.pt"
LOG = "log.jsonl"

# What may differ between the parts of one run: it has no say in what is learnt.
_FREE = ("save_every", "eval_every", "eval_windows", "export_dtype", "shard_bytes")


def write_state(folder: Path, config: ModelConfig, settings: TrainSettings, state: dict[str, Any]) -> None:
    """One file that appears whole or not at all, whenever the process is killed. Raises OSError."""
    with whole(folder / STATE) as partial, partial.open("wb") as file:
        torch.save({"config": dataclasses.asdict(config), "settings": dataclasses.asdict(settings)} | state, file)
        file.flush()
        os.fsync(file.fileno())


def read_state(folder: Path, config: ModelConfig, settings: TrainSettings) -> dict[str, Any] | None:
    """The folder's state on the CPU, or None where there is none. Raises TrainingError when it is of another run."""
    path = folder / STATE
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    for name, mine, defaults in (
        ("config", dataclasses.asdict(config), dataclasses.asdict(ModelConfig())),
        ("settings", dataclasses.asdict(settings), dataclasses.asdict(TrainSettings())),
    ):
        saved = defaults | state[name]  # what a state of an older version does not name had its default
        changed = [key for key, value in mine.items() if saved[key] != value and key not in _FREE]
        if changed:
            raise TrainingError(f"{path}: belongs to a run with another {', '.join(changed)}; choose another folder")
    return state


def log_line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def cut_log(folder: Path, step: int) -> None:
    """Drop what was logged after ``step``, or half a line, before a run that ended early is taken up again there."""
    path = folder / LOG
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    with whole(path) as partial:
        partial.write_text("".join(kept))
