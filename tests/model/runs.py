"""A small model, how to train it, and what a run leaves, for the tests of training."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from model.checkpoint import load_model
from model.config import ModelConfig
from model.recipe import TrainSettings
from model.train import Trainer

CONFIG = ModelConfig(
    vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2, group_size=4, n_expert=6, expert_size=8
)
SETTINGS = TrainSettings(
    steps=8, batch=8, length=16, warmup=2, learning_rate=1e-2, save_every=4, anneal_from=0.5, export_dtype="float32"
)
STREAM = np.random.default_rng(0).integers(0, 60, 2000).astype(np.uint16)
TEXT = "\n\n".join(f"The {n} boats went out at {n * 7 % 11} and came home." for n in range(900))


def make_trainer(folder: Path, config: ModelConfig = CONFIG, **changes: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(config, dataclasses.replace(SETTINGS, **changes), STREAM, folder)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All but the speed."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_model(folder).state_dict()


def train_command(folder: Path, text: Path, *more: str) -> list[str]:
    """The tiny preset for 30 steps."""
    return [
        sys.executable, "-m", "server", "train", str(folder), "--data", str(text), "--preset", "tiny", "--steps", "30",
        "--save-every", "1", "--export-dtype", "float32", *more,
    ]  # fmt: skip
