"""Small checkpoints, and ways to change them, for the tests of loading and saving."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer

MOT = ModelConfig(vocab_size=23, n_positions=8, n_embd=8, n_layer=2, n_head=2, group_size=2, n_expert=3, expert_size=5)
DENSE = MOT.replace(model_type="gpt2", n_inner=12)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Edit = Callable[[dict[str, Tensor]], object]


def make(config: ModelConfig = MOT) -> Transformer:
    model = Transformer(config)
    model.initialize(seed=1)
    return model


def edit(folder: Path, change: Edit, file: str = WEIGHTS) -> None:
    """Rewrites one file with its tensors changed."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
