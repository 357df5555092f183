"""One small configuration of each kind of feed-forward layer, and its layer computed token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention import attend_whole_sequences
from model.config import ModelConfig
from model.mixing import ExpertBank, WholeSequences
from model.token_choice import TrainedTokenChoice
from model.transformer import Mix, Transformer

MOT = ModelConfig(
    vocab_size=61, n_positions=40, n_embd=24, n_layer=2, n_head=2, group_size=4, n_expert=8, expert_size=10
)
SWITCH = MOT.replace(model_type="switch", n_expert=5, expert_size=20)
TOP_K = MOT.replace(model_type="top-k", n_expert=9, n_shared_expert=2, experts_per_token=3)
EXPERT_CHOICE = MOT.replace(model_type="expert-choice", temperature=0.0)
KINDS = {
    "dense": MOT.replace(model_type="gpt2", n_inner=20),
    "mot": MOT,
    "switch": SWITCH,
    "top-k": TOP_K,
    "top-k-normalized": TOP_K.replace(normalize_gates=True, activation_function="silu"),
    "expert-choice": EXPERT_CHOICE,
}
TOKEN_CHOICE = {name: config for name, config in KINDS.items() if config.is_token_choice}


def make(config: ModelConfig, scale: float = 6.0) -> Transformer:
    """Weights large enough that attention, routing and experts all matter."""
    model = Transformer(config)
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.eval().requires_grad_(False)


def trainers_logits(model: Transformer, ids: Tensor) -> Tensor:
    """Log probabilities ``[batch, length, V]`` of ``ids [batch, length]`` by the trainer's pass, without dropping."""
    batch, length = ids.shape
    mix: Mix = TrainedTokenChoice(None)
    if model.config.is_grouped:
        mix = WholeSequences(model.config, batch)
    hidden = model(
        ids.flatten(), torch.arange(length).repeat(batch),
        lambda _, qkv: attend_whole_sequences(qkv, batch, model.config.n_head), mix,
    )  # fmt: skip
    return torch.log_softmax(model.logits(hidden), -1).view(batch, length, -1)


def token_choice_by_hand(bank: ExpertBank, x: Tensor) -> Tensor:
    """The definition: one token after the other, one expert after the other."""
    routed = bank.controller.shape[1]
    out = torch.zeros_like(x)
    for token, row in enumerate(x):
        probabilities = torch.softmax(row @ bank.controller, 0).tolist()
        best = sorted(range(routed), key=lambda e: (-probabilities[e], e))[: bank.per_token]
        total = sum(probabilities[e] for e in best) if bank.normalize else 1.0
        weights = {e: probabilities[e] / total for e in best} | {routed + s: 1.0 for s in range(bank.shared)}
        for e, weight in weights.items():
            out[token] += weight * (bank.activation(row @ bank.lin1[e]) @ bank.lin2[e])
    return out


def expert_choice_by_hand(bank: ExpertBank, group: Tensor) -> Tensor:
    """The definition for one group ``[G, D]``: every expert takes the token with the best probability."""
    scores = torch.softmax(group @ bank.controller, 1)
    out = torch.zeros_like(group)
    for e in range(scores.shape[1]):
        values = scores[:, e].tolist()
        token = values.index(max(values))
        out[token] += values[token] * (bank.activation(group[token] @ bank.lin1[e]) @ bank.lin2[e])
    return out
