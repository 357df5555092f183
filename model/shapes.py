"""Sizes of known models, by name: what presets train and what benchmarks measure. Knows nothing else of them."""

from __future__ import annotations

from model.config import ModelConfig

# In seconds, for a try.
TINY = ModelConfig(
    vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=4, group_size=4, n_expert=8, expert_size=32
)
# The bundled checkpoint: 8 times the feed-forward parameters of the dense model with the same FLOPs a token.
DEMO = ModelConfig(
    vocab_size=4096, n_positions=256, n_embd=256, n_layer=4, n_head=8, group_size=8, n_expert=64, expert_size=72
)
# The small model of Antoniak et al. (arXiv 2310.15961): 32 times the parameters (512 * 64 / 32 = 4 * 256).
PAPER = ModelConfig(
    vocab_size=32000, n_positions=256, n_embd=256, n_layer=4, n_head=4, group_size=32, n_expert=512, expert_size=64
)
# The published checkpoint jaszczur/mixture_of_tokens.
MOT_MEDIUM = ModelConfig(
    vocab_size=50257, n_positions=256, n_embd=512, n_layer=8, n_head=8, group_size=32, n_expert=256, expert_size=256
)
