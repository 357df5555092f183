"""The decoder: token ids and positions to hidden states and logits (GPT-2's arrangement, pre-norm).

It does not know how rows are arranged into sequences, pages or groups: the caller hands in ``attend`` and ``mix``,
which do. Whole sequences (training, evaluation) and the paged engine therefore run the same code.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import ModelConfig
from model.feed_forward import DenseFeedForward
from model.layers import TORCH, Arithmetic
from model.mixing import ExpertBank


class Attend(Protocol):
    """Causal attention of one layer over rows ``qkv [n, 3D]``; returns ``[n, D]``. Keys and values are its affair."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor: ...


class Mix(Protocol):
    """One layer of experts over rows ``x [n, D]`` after the layer norm; returns ``[n, D]``. Who uses which expert, and
    with whom, is its affair."""

    def __call__(self, layer: int, bank: ExpertBank, x: Tensor) -> Tensor: ...


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = ExpertBank(config) if config.has_experts else DenseFeedForward(config)

    def forward(self, layer: int, x: Tensor, attend: Attend, mix: Mix, arithmetic: Arithmetic) -> Tensor:
        qkv = arithmetic.affine(arithmetic.normalize(x, self.ln_1), self.attn.c_attn)
        x = arithmetic.affine(attend(layer, qkv), self.attn.c_proj, x)
        normed = arithmetic.normalize(x, self.ln_2)
        if isinstance(self.mlp, ExpertBank):
            return x + mix(layer, self.mlp, normed)
        return self.mlp(normed, arithmetic, x)  # type: ignore[no-any-return]


def _embedding(count: int, width: int) -> nn.Embedding:
    """Not initialised: without memory ("meta"), torch would import 800 modules for it, which takes two seconds."""
    return nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)  # type: ignore[no-any-return, no-untyped-call]


class Transformer(nn.Module):
    """Parameter names are those of Hugging Face's GPT-2 without the ``transformer.`` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = _embedding(config.vocab_size, config.n_embd)
        self.wpe = _embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def blocks(self) -> list[Block]:
        return list(self.h)  # type: ignore[arg-type]

    @property
    def banks(self) -> list[ExpertBank]:
        """The layers of experts, in order; empty for a dense model."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, ExpertBank)]

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.wte.weight.dtype

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters()) - sum(bank.filled_up for bank in self.banks)

    @property
    def weight_bytes(self) -> int:
        """What the parameters take, without what tiles were filled up with."""
        filled_up = sum(bank.filled_up * bank.lin1.element_size() for bank in self.banks)
        return sum(parameter.nbytes for parameter in self.parameters()) - filled_up

    def initialize(self, seed: int) -> None:
        """GPT-2's initialisation: normal of 0.02, divided by sqrt(2 * layers) where a block writes to the residual.
        Feed-forward layers begin at 1 / sqrt(n_embd) instead of 0.02, nearly the same at the width of the largest GPT-2
        and better for narrow models, dense ones most (docs/results.md)."""
        torch.manual_seed(seed)
        std, feed_forward_std = 0.02, self.config.n_embd**-0.5
        residual = 1 / math.sqrt(2 * self.config.n_layer)
        nn.init.normal_(self.wte.weight, std=std)
        nn.init.normal_(self.wpe.weight, std=std)
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=std)
        for block in self.blocks:
            block.attn.c_attn.initialize(std)
            block.attn.c_proj.initialize(std * residual)
            block.mlp.initialize(feed_forward_std, feed_forward_std * residual)
        for bank in self.banks:
            nn.init.normal_(bank.controller, std=std)  # temperatures are relative to it

    def forward(
        self, ids: Tensor, positions: Tensor, attend: Attend, mix: Mix, arithmetic: Arithmetic = TORCH
    ) -> Tensor:
        """``ids [n]`` and ``positions [n]`` of n rows to hidden states ``[n, D]`` after the last layer norm."""
        tokens, places = self.wte(ids), self.wpe(positions)
        x = tokens.to(arithmetic.dtype) + places.to(arithmetic.dtype) if arithmetic.dtype else tokens + places
        for layer, block in enumerate(self.blocks):
            x = block(layer, x, attend, mix, arithmetic)
        return arithmetic.normalize(x, self.ln_f)

    def logits(self, hidden: Tensor, arithmetic: Arithmetic = TORCH) -> Tensor:
        """``hidden [n, D]`` to ``[n, vocab_size]``."""
        return arithmetic.head(hidden, self.wte.weight if self.lm_head is None else self.lm_head.weight)
