"""Text files to batches of token windows. Knows files, token ids and seeds; nothing of models."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.errors import TrainingError
from model.tokenizer import END_OF_TEXT, Tokenizer


def read_text(path: Path) -> str:
    """A UTF-8 text file, plain or ``.xz``. Raises TrainingError naming the file."""
    try:
        raw = path.read_bytes()
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: {error}") from None


def documents(text: str) -> Iterator[str]:
    """The documents of a corpus whose documents each end in a line ``<|endoftext|>``."""
    for document in text.split(END_OF_TEXT):
        if document.strip():
            yield document.strip("\n") + "\n"


def encode_corpus(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """All documents as one stream of ids, ``<|endoftext|>`` after each: ``[tokens]`` int32."""
    end = tokenizer.id_of(END_OF_TEXT)
    if end is None:
        raise TrainingError(f"the tokenizer has no {END_OF_TEXT} token")
    stream: list[np.ndarray] = []
    for ids in tokenizer.encode_batch(list(documents(text))):
        stream.append(np.asarray([*ids, end], dtype=np.int32))
    return np.concatenate(stream) if stream else np.zeros(0, np.int32)


class WindowSampler:
    """Batches of windows of ``length + 1`` ids, every window at most once an epoch in an order that the seed
    fixes (what does not fill a last batch is left out).

    ``batch(step)`` is a pure function of the step, so that a resumed run sees what an unbroken one would have.
    """

    def __init__(self, stream: np.ndarray, *, batch: int, length: int, seed: int) -> None:
        self.windows = (len(stream) - 1) // length - 1  # the last one pays for the epoch's random offset
        if self.windows < batch:
            raise TrainingError(f"data: {len(stream)} tokens are fewer than one batch of {batch} x {length} needs")
        self._stream = torch.from_numpy(stream.astype(np.int64))
        self._batch, self._length, self._seed = batch, length, seed
        self._epoch = -1
        self._starts = torch.zeros(0, dtype=torch.int64)

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            offset = int(torch.randint(self._length, (1,), generator=generator))
            self._starts = torch.randperm(self.windows, generator=generator) * self._length + offset
            self._epoch = epoch

    def batch(self, step: int) -> Tensor:
        """``[batch, length + 1]`` ids of a step counted from 0."""
        per_epoch = self.windows // self._batch
        self._enter(step // per_epoch)
        first = (step % per_epoch) * self._batch
        starts = self._starts[first : first + self._batch]
        return self._stream[starts[:, None] + torch.arange(self._length + 1)]
