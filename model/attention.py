"""Causal self-attention: the projections, and the plain whole-sequence form.

The paged forms, which the engine uses, are in ``model.kv_cache``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import Projection


class Attention(nn.Module):
    """GPT-2's projections: ``c_attn [D, 3D]`` to queries, keys and values; ``c_proj [D, D]`` back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)


def attend_whole_sequences(qkv: Tensor, batch: int, n_head: int) -> Tensor:
    """``qkv [B * L, 3D]`` of B whole sequences, row-major, to ``[B * L, D]``."""
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    q, k, v = qkv.view(batch, rows // batch, 3, n_head, width // n_head).permute(2, 0, 3, 1, 4)  # [B, H, L, D/H]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).reshape(rows, width)
