"""Models of known shapes with random weights: for speed, which does not depend on what weights say."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.groups import Fill
from model.kinds import flop_matched
from model.memory import move_to_large_pages
from model.reference import ReferenceCrowd
from model.shapes import DEMO, MOT_MEDIUM, PAPER
from model.transformer import Transformer

SHAPES: dict[str, ModelConfig] = {
    "demo": DEMO.replace(temperature=0.1),
    "paper": PAPER,
    "paper-dense": flop_matched(PAPER, "dense"),
    "mot-medium": MOT_MEDIUM,
    "gpt2-small": ModelConfig(
        model_type="gpt2", vocab_size=8192, n_positions=512, n_embd=512, n_layer=8, n_head=8
    ),
}  # fmt: skip


def config_of(shape: str) -> ModelConfig:
    """Raises ValueError naming the shapes there are."""
    if shape not in SHAPES:
        raise ValueError(f"shape: {shape!r} is not one of {', '.join(SHAPES)}")
    return SHAPES[shape]


def random_model(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> tuple[Transformer, Fill]:
    """Weights as training begins with, and a crowd of random activations."""
    model = Transformer(config)
    model.initialize(0)
    model.eval().requires_grad_(False)
    if device.type == "cpu":
        move_to_large_pages(model, dtype)
    else:
        model = model.to(device=device, dtype=dtype)
    if not config.is_grouped:
        return model, Fill("none", None)
    shape = (config.n_layer, config.n_positions, config.group_size, config.n_embd)
    crowd = ReferenceCrowd(torch.randn(shape, device=device).to(dtype), model.banks, fingerprint="random")
    return model, Fill.build("reference", config, model.banks, crowd)
