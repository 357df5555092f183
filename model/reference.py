"""The reference crowd: constant activations that fill a group, recorded once and stored with the checkpoint.

G calibration sequences, run together as one group at every position, leave what the MoT layers saw of them: that is
what a lone token finds beside it instead of strangers. Members are read, never written.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.attention import attend_whole_sequences
from model.config import ModelConfig
from model.errors import CheckpointError
from model.files import whole
from model.mixing import ExpertBank, WholeSequences, exact_products
from model.transformer import Transformer

FILE = "reference.safetensors"
TENSOR = "activations"
MEAN = "mean"


class ReferenceCrowd:
    """``activations [layers, positions, G, D]``, and their float32 ``scores [layers, positions, E, G]`` against each
    expert.

    Members are kept in reverse: member j stands at place G-1-j, so that a group whose first k places are live has the
    first G-k members in the rest, whatever k is.

    ``rivals``: a row at temperature 0 has an expert when it beats those at places 1 to ``rivals``; None: all G-1. The
    fewer, the more experts it has, and at some number it decodes best (``calibrate.best_rivals``). ``dtype``: what
    members are kept in, if not the activations' type; scores are of the activations as they come.
    """

    def __init__(
        self,
        activations: Tensor,
        banks: list[ExpertBank],
        *,
        fingerprint: str | None,
        rivals: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        places = activations.flip(2).contiguous()
        self.places = places if dtype is None else places.to(dtype)
        self.rivals = places.shape[2] - 1 if rivals is None else rivals
        self.scores = torch.stack(
            [
                bank.scores(exact_products(layer, bank.controller)).transpose(1, 2)
                for layer, bank in zip(places, banks, strict=True)
            ]
        ).contiguous()
        self.fingerprint = fingerprint

    @classmethod
    def zeros(cls, config: ModelConfig, banks: list[ExpertBank]) -> ReferenceCrowd:
        """Zero vectors in the crowd's place: what the public ``mot`` model pads with. One position serves all."""
        like = banks[0].controller
        shape = (config.n_layer, 1, config.group_size, config.n_embd)
        return cls(torch.zeros(shape, dtype=like.dtype, device=like.device), banks, fingerprint=None)

    def at(self, layer: int, positions: Tensor) -> Tensor:
        """``positions [n]`` to the crowd there ``[n, G, D]``."""
        if self.places.shape[1] == 1:
            return self.places[layer].expand(positions.shape[0], -1, -1)
        return self.places[layer].index_select(0, positions)

    def scores_at(self, layer: int, positions: Tensor) -> Tensor:
        """``positions [n]`` to the crowd's scores there ``[n, E, G]``."""
        if self.scores.shape[1] == 1:
            return self.scores[layer].expand(positions.shape[0], -1, -1)
        return self.scores[layer].index_select(0, positions)


@torch.inference_mode()
def record(model: Transformer, ids: Tensor) -> Tensor:
    """Run ``ids [G, positions]`` as one group and return what every MoT layer saw: ``[layers, positions, G, D]``.

    Raises ValueError when there are not exactly G sequences or not as many tokens as the model has positions.
    """
    config = model.config
    if ids.shape != (config.group_size, config.n_positions):
        raise ValueError(f"the crowd needs {config.group_size} sequences of {config.n_positions} tokens")
    size, length = ids.shape
    seen: list[Tensor] = []
    mixed = WholeSequences(config, size)

    def mix(layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
        seen.append(x.view(size, length, -1).transpose(0, 1).clone())
        return mixed(layer, bank, x)

    positions = torch.arange(length, device=ids.device).repeat(size)
    model(ids.flatten(), positions, lambda _, qkv: attend_whole_sequences(qkv, size, config.n_head), mix)
    return torch.stack(seen)


def save(activations: Tensor, folder: Path, dtype: torch.dtype) -> None:
    """Each layer's mean ``[layers, D]`` in float32, and in ``dtype`` what members differ from it by: what all have in
    common can be a hundred times as large as what tells them apart, and scores depend on the latter alone."""
    exact = activations.float()
    mean = exact.mean((1, 2))
    differences = (exact - mean[:, None, None]).to(dtype).contiguous()
    _write({TENSOR: differences, MEAN: mean.contiguous()}, folder, {})


def set_rivals(folder: Path, rivals: int) -> None:
    """Of the crowd that is there, whose members stay as they are."""
    _write(load_file(folder / FILE), folder, {"rivals": str(rivals)})


def _write(tensors: dict[str, Tensor], folder: Path, metadata: dict[str, str]) -> None:
    """Whole or not at all."""
    with whole(folder / FILE) as partial:
        save_file(tensors, partial, metadata={"format": "pt", **metadata})
        shutil.copymode(folder / "config.json", partial)  # safetensors writes for the owner alone


def load(folder: Path, model: Transformer) -> ReferenceCrowd | None:
    """The folder's crowd on the model's device and in its type, or None where there is none. Raises CheckpointError
    when the file is broken or of another shape."""
    path = folder / FILE
    if not path.exists():
        return None
    config = model.config
    expected = (config.n_layer, config.n_positions, config.group_size, config.n_embd)
    try:
        with safe_open(path, framework="pt") as file:
            activations = file.get_tensor(TENSOR)
            mean = file.get_tensor(MEAN) if MEAN in file.keys() else None  # noqa: SIM118 (no mapping)
            stored = (file.metadata() or {}).get("rivals")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if tuple(activations.shape) != expected:
        raise CheckpointError(f"{path}: {TENSOR} has shape {tuple(activations.shape)}, expected {expected}")
    activations = activations.to(model.device, torch.float32)
    if mean is not None:
        if mean.shape != (config.n_layer, config.n_embd):
            raise CheckpointError(
                f"{path}: {MEAN} has shape {tuple(mean.shape)}, expected {(config.n_layer, config.n_embd)}"
            )
        activations += mean.to(activations)[:, None, None]
    return ReferenceCrowd(
        activations, model.banks, fingerprint=digest, rivals=_rivals(stored, config, path), dtype=model.dtype
    )


def _rivals(stored: str | None, config: ModelConfig, path: Path) -> int | None:
    if stored is None:
        return None
    if not stored.isdecimal() or not 1 <= int(stored) < config.group_size:
        raise CheckpointError(f"{path}: rivals must be a number from 1 to {config.group_size - 1}, not {stored!r}")
    return int(stored)
