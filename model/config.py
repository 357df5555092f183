"""Frozen model configuration, read from and written to a checkpoint's ``config.json``.

Field names are Hugging Face's (GPT-2's and the public ``mot`` model's). This module does not know tensors:
``model.checkpoint`` corrects the expert count and size from the tensors' shapes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from model.errors import CheckpointError

# What the feed-forward layers are: Mixture of Tokens, dense, or one of the other mixtures of experts.
ModelType = Literal["mot", "gpt2", "switch", "top-k", "expert-choice"]
MODEL_TYPES: tuple[ModelType, ...] = get_args(ModelType)

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")

# Settings of Hugging Face's GPT-2 that change the arithmetic and that this decoder does not implement.
_UNSUPPORTED: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


_GPT2_END_OF_TEXT = 50256

# Hugging Face's class names, for those kinds that have one there.
_ARCHITECTURES = {"mot": "MoTLMHeadModel", "gpt2": "GPT2LMHeadModel"}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one decoder. Defaults are Hugging Face's for ``GPT2Config`` and ``MoTConfig``,
    whose ``config.json`` leaves out what equals the default.

    ``model_type`` says what the feed-forward layers are: ``gpt2`` dense, ``mot`` and ``expert-choice`` over groups of
    tokens (``model.mixing``), ``switch`` and ``top-k`` token by token (``model.token_choice``)."""

    model_type: ModelType = "mot"
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # hidden size of the dense layer; None: 4 * n_embd
    group_size: int = 32
    n_expert: int = 32  # routed ones
    n_shared_expert: int = 0  # top-k: experts that every token uses beside the routed ones
    experts_per_token: int = 1  # top-k: routed experts that a token uses
    normalize_gates: bool = False  # top-k: their gates over the gates' sum
    expert_size: int = 0  # 0: not stated; the loader reads it from the tensors
    temperature: float = 1.0
    emit_softmax_over_experts: bool = False
    use_discrete_routing: bool = False
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "group_size", "n_expert"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, not {self.model_type!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number of at least 0, not {self.temperature!r}")
        if not _is_number(self.layer_norm_epsilon) or not 0 < self.layer_norm_epsilon < float("inf"):
            raise ValueError(f"layer_norm_epsilon must be a number above 0, not {self.layer_norm_epsilon!r}")
        for name in ("emit_softmax_over_experts", "use_discrete_routing", "normalize_gates", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(f"activation_function {self.activation_function!r} is not one of {', '.join(ACTIVATIONS)}")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and not (_is_whole(value) and 0 <= value < self.vocab_size):
                raise ValueError(f"{name} must be a token id below vocab_size ({self.vocab_size}), not {value!r}")
        self._check_kind()

    def _check_kind(self) -> None:
        """What only some kinds of feed-forward layer have."""
        for name, least in (("n_shared_expert", 0), ("experts_per_token", 1)):
            value = getattr(self, name)
            if not _is_whole(value) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        chooses = (self.n_shared_expert, self.experts_per_token, self.normalize_gates)
        if self.model_type != "top-k" and chooses != (0, 1, False):
            raise ValueError("n_shared_expert, experts_per_token, normalize_gates: only for model_type top-k")
        if self.is_token_choice and self.experts_per_token > self.n_expert:
            raise ValueError(f"experts_per_token ({self.experts_per_token}) exceeds n_expert ({self.n_expert})")
        if self.normalize_gates and self.experts_per_token == 1:
            raise ValueError("normalize_gates: the gate of one expert alone would always be 1")
        one_hot = self.emit_softmax_over_experts or self.use_discrete_routing
        if one_hot and (self.is_token_choice or self.model_type == "expert-choice"):
            raise ValueError("emit_softmax_over_experts, use_discrete_routing: only for model_type mot")
        if self.model_type == "expert-choice" and self.temperature != 0:
            raise ValueError(f"temperature must be 0 for expert-choice, not {self.temperature!r}")

    @property
    def is_mot(self) -> bool:
        return self.model_type == "mot"

    @property
    def is_grouped(self) -> bool:
        """Tokens of different sequences meet in groups of ``group_size``."""
        return self.model_type in ("mot", "expert-choice")

    @property
    def is_token_choice(self) -> bool:
        """Each token chooses its experts by itself."""
        return self.model_type in ("switch", "top-k")

    @property
    def has_experts(self) -> bool:
        return self.model_type != "gpt2"

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def hidden_size(self) -> int:
        """Hidden size of the dense feed-forward layer (``gpt2``)."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def active_hidden(self) -> float:
        """Hidden units that a token pays for, mean over tokens: the feed-forward layer costs ``4 * n_embd`` FLOPs a
        token for each (scores and mixing not counted). A group of G costs one pass over all experts."""
        if self.is_grouped:
            return self.n_expert * self.expert_size / self.group_size
        if self.is_token_choice:
            return float((self.experts_per_token + self.n_shared_expert) * self.expert_size)
        return float(self.hidden_size)

    @property
    def expansion(self) -> float:
        """Feed-forward parameters over those of the dense layer with the same FLOPs a token."""
        if self.is_token_choice:
            return (self.n_expert + self.n_shared_expert) / (self.experts_per_token + self.n_shared_expert)
        return float(self.group_size) if self.is_grouped else 1.0

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Raises ValueError naming the field that is wrong or not supported. Unknown fields, of which Hugging Face
        configurations carry many, do not matter here."""
        for name, supported in _UNSUPPORTED.items():
            if values.get(name, supported) != supported:
                raise ValueError(f"{name} = {values[name]!r} is not supported (only {supported!r})")
        known = {field.name for field in dataclasses.fields(cls)}
        chosen = {name: value for name, value in values.items() if name in known and value is not None}
        for name in ("bos_token_id", "eos_token_id"):
            value = chosen.get(name)
            # Hugging Face writes GPT-2's 50256 into configurations of smaller vocabularies too.
            if value == _GPT2_END_OF_TEXT and _is_whole(value) and value >= chosen.get("vocab_size", cls.vocab_size):
                del chosen[name]
        if "model_type" not in chosen:
            raise ValueError(f"model_type is missing (one of {', '.join(MODEL_TYPES)})")
        return cls(**chosen)

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Raises CheckpointError when ``config.json`` is missing, is not JSON or holds a bad value."""
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not found") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: not a JSON object")
        try:
            return cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    def save(self, folder: Path) -> None:
        values = dataclasses.asdict(self)
        if self.model_type in _ARCHITECTURES:
            values = {"architectures": [_ARCHITECTURES[self.model_type]], **values}
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
