"""Perplexity of a checkpoint in each way that the server can run it. Knows models and text, nothing of serving."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import attend_whole_sequences
from model.checkpoint import load_model
from model.config import ModelConfig
from model.data import encode_corpus, read_text
from model.errors import CheckpointError, TrainingError
from model.groups import Fill, PrivateRows
from model.layers import TORCH, Arithmetic
from model.mixing import WholeSequences
from model.native import Kernels
from model.native.arithmetic import NativeArithmetic
from model.reference import ReferenceCrowd
from model.token_choice import TokenChoice
from model.tokenizer import Tokenizer
from model.transformer import Mix, Transformer

Mode = Literal["mixed", "private", "private_unmixed", "zeros", "alone"]
MODES: tuple[Mode, ...] = ("mixed", "private", "private_unmixed", "zeros", "alone")


def modes_of(config: ModelConfig) -> tuple[Mode, ...]:
    """The modes in which such a model can be run. Without groups nothing mixes, and all would be the same: there
    ``mixed`` is the plain forward pass."""
    return MODES if config.is_grouped else ("mixed",)


@dataclass(frozen=True)
class Evaluation:
    """``temperature`` is the one that the mode mixes with; ``experts_per_token`` the mean over layers and tokens of
    those that run for the token (for its group: all of them; a dense layer counts as one). Bytes are those of the
    predicted tokens' text; ``<|endoftext|>`` has none."""

    mode: str
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    temperature: float
    experts_per_token: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def windows_of(stream: np.ndarray, length: int, most: int | None = None) -> Tensor:
    """Consecutive windows of ``length + 1`` ids, the last id of one being the first of the next: ``[n, length + 1]``;
    ``most`` of them, evenly spread, when there are more. Raises TrainingError when there is not even one."""
    count = (len(stream) - 1) // length
    if count < 1:
        raise TrainingError(f"data: {len(stream)} tokens are fewer than one window of {length + 1}")
    chosen = np.arange(count)
    if most is not None and most < count:
        chosen = np.linspace(0, count - 1, most).round().astype(np.int64)
    starts = torch.from_numpy(chosen * length)
    ids = torch.from_numpy(stream.astype(np.int64))
    return ids[starts[:, None] + torch.arange(length + 1)]


class Evaluator:
    """Scores the same windows in every mode, so that perplexities compare. ``kernels`` None: the plain path, which is
    slow at private rows."""

    def __init__(
        self,
        model: Transformer,
        windows: Tensor,
        fill: Fill,
        tokenizer: Tokenizer | None,
        kernels: Kernels | None = None,
    ) -> None:
        self.model, self.config, self.fill, self._kernels = model, model.config, fill, kernels
        if kernels is not None:
            kernels.arrange(model)  # as it is served
        # Mixing is measured in full groups only: as many windows as fill them.
        full = windows.shape[0] - windows.shape[0] % (self.config.group_size if self.config.is_grouped else 1)
        if not full:
            raise TrainingError(
                f"data: {windows.shape[0]} windows are fewer than one group ({self.config.group_size}) needs"
            )
        self.windows = windows[:full].to(model.device)
        self._bytes: int | None = None
        if tokenizer is not None:
            size_of = [len(tokenizer.token_bytes(token)) for token in range(self.config.vocab_size)]
            if self.config.eos_token_id is not None:
                size_of[self.config.eos_token_id] = 0
            self._bytes = int(torch.tensor(size_of)[windows[:full, 1:].cpu()].sum())

    def run(
        self, mode: Mode, *, temperature: float, skip_below: float, progress: Callable[[float], None] | None = None
    ) -> Evaluation:
        """``temperature`` and ``skip_below`` matter to ``private`` only. ``progress`` gets the fraction done. Raises
        ValueError for a mode that the model has not."""
        if mode not in modes_of(self.config):
            raise ValueError(f"mode: {mode!r} needs tokens that mix; a {self.config.model_type} model has 'mixed' only")
        if mode == "private_unmixed":
            temperature, skip_below = 0.0, 0.0
        elif mode != "private":
            temperature = self.config.temperature
        nats, used, done = 0.0, 0.0, 0
        size = self.config.group_size if mode == "mixed" and self.config.is_grouped else 1
        for batch in torch.split(self.windows, size):
            loss, experts = self._score(batch, mode, temperature, skip_below)
            nats, used, done = nats + loss, used + experts, done + batch.shape[0]
            if progress is not None:
                progress(done / self.windows.shape[0])
        tokens = self.windows[:, 1:].numel()
        bits = nats / math.log(2) / self._bytes if self._bytes else None
        return Evaluation(mode, math.exp(nats / tokens), bits, tokens, temperature, used / tokens)

    @torch.inference_mode()
    def _score(self, batch: Tensor, mode: Mode, temperature: float, skip_below: float) -> tuple[float, float]:
        """Nats of all predicted tokens of ``batch [b, length + 1]``, and experts used summed over tokens."""
        count, length = batch.shape[0], batch.shape[1] - 1
        positions = torch.arange(length, device=batch.device).repeat(count)
        mix: Mix
        if not self.config.is_grouped:
            mix = TokenChoice(self._kernels)
        elif mode in ("private", "private_unmixed"):
            rows = torch.ones(count * length, device=batch.device)
            mix = PrivateRows(
                self.config,
                self.fill,
                positions=positions,
                temperatures=rows * temperature,
                skip_below=rows * skip_below,
                live=rows.bool(),
                kernels=self._kernels,
            )
        else:
            mix = WholeSequences(self.config, count, pad=mode != "alone")
        attend = partial(_attend, count, self.config.n_head)
        # As the engine does it; here no row has to be the same beside others.
        arithmetic: Arithmetic = TORCH
        if self._kernels is not None:
            arithmetic = NativeArithmetic(self._kernels, shared=count * length)
        hidden = self.model(batch[:, :-1].reshape(-1), positions, attend, mix, arithmetic)
        loss = 0.0
        for rows, targets in zip(torch.split(hidden, 1024), torch.split(batch[:, 1:].reshape(-1), 1024), strict=True):
            loss += float(F.cross_entropy(self.model.logits(rows, arithmetic).float(), targets, reduction="sum"))
        if isinstance(mix, PrivateRows):
            return loss, float(mix.experts_used.sum()) / self.config.n_layer
        return loss, float(count * length * self._experts_run())

    def _experts_run(self) -> int:
        if self.config.is_token_choice:
            return self.config.experts_per_token + self.config.n_shared_expert
        return self.config.n_expert if self.config.is_grouped else 1


def _attend(batch: int, heads: int, layer: int, qkv: Tensor) -> Tensor:
    return attend_whole_sequences(qkv, batch, heads)


@dataclass(frozen=True)
class Opened:
    """A checkpoint and windows of text to score it on."""

    model: Transformer
    tokenizer: Tokenizer
    windows: Tensor  # [n, n_positions + 1]

    def encode(self, data: Path) -> np.ndarray:
        return encode_corpus(self.tokenizer, read_text(data))

    def evaluator(self, crowd: ReferenceCrowd | None, kernels: Kernels | None = None) -> Evaluator:
        config = self.model.config
        fill = Fill.build("reference", config, self.model.banks, crowd) if config.is_grouped else Fill("none", None)
        return Evaluator(self.model, self.windows, fill, self.tokenizer, kernels)


def open_for_scoring(folder: Path, data: Path, *, windows: int | None, dtype: torch.dtype = torch.float32) -> Opened:
    """``windows``: about how many (rounded up to full groups), spread over the text; None: all of it. Raises
    CheckpointError (also when there is no tokenizer) or TrainingError."""
    model = load_model(folder, dtype=dtype)
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: not found; text cannot be scored without it")
    if windows is not None and model.config.is_grouped:
        windows = -(-windows // model.config.group_size) * model.config.group_size
    stream = encode_corpus(tokenizer, read_text(data))
    return Opened(model, tokenizer, windows_of(stream, model.config.n_positions, windows))
