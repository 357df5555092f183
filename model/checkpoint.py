"""Checkpoint folders to models and back: safetensors, one file or shards with an index.

The only file that knows foreign names: Hugging Face's for ``gpt2`` and the public ``mot`` model, with or without the
``transformer.`` prefix. It knows nothing of tokenizers, the reference crowd or serving.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.errors import CheckpointError
from model.memory import in_large_pages
from model.transformer import Transformer

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PREFIX = "transformer."
_HEAD = "lm_head.weight"
_EMBEDDING = "wte.weight"
# Causal masks that older GPT-2 files store as if they were weights.
_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Stored:
    """One tensor of a file, mapped and not yet read."""

    path: Path
    name: str  # as the file has it
    tensor: Tensor

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name!r}"


def load_model(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, large_pages: bool = False
) -> Transformer:
    """The folder's model, for inference: eval mode, no gradients.

    Weights stay mapped from the file where device and dtype allow; writing to them changes memory, never the file.
    ``large_pages``: on a CPU they are read into memory that is faster to read again and again.
    Expert count and size (``gpt2``: the hidden size) come from the tensors' shapes, whatever ``config.json`` says.
    ``dtype`` None keeps the one of the token embedding.

    Raises CheckpointError naming the file and the tensor.
    """
    config = ModelConfig.load(folder)
    stored = _own_names(_open_folder(folder))
    if config.tie_word_embeddings:
        _drop_tied_head(stored)
    config = _with_stored_sizes(config, stored)
    model = _empty_model(config, stored, folder)
    _check(stored, model, folder)
    kind = stored[_EMBEDDING].tensor.dtype if dtype is None else dtype
    # One tensor at a time, or one a thread: a conversion never holds two copies of the whole model's weights in memory.
    if large_pages and torch.device(device).type == "cpu":
        names = list(stored)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # most of the time goes to pages touched first
            tensors = dict(
                zip(names, pool.map(lambda name: in_large_pages(stored.pop(name).tensor, kind), names), strict=True)
            )
    else:
        tensors = {name: stored[name].tensor.to(device=device, dtype=kind) for name in stored}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _open_file(path: Path) -> dict[str, _Stored]:
    """All tensors of one file by their names in it. Maps the file; reads nothing but its header."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: _Stored(path, name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None


def _open_folder(folder: Path) -> dict[str, _Stored]:
    """All tensors of the single file or, where there is none, of the shards that the index names."""
    if (folder / _SINGLE).exists() or not (folder / _INDEX).exists():
        return _open_file(folder / _SINGLE)
    placed = _read_index(folder / _INDEX)
    found: dict[str, _Stored] = {}
    for shard in sorted(set(placed.values())):
        if not (folder / shard).exists():
            name = next(name for name, place in placed.items() if place == shard)
            raise CheckpointError(f"{folder / _INDEX}: shard {shard!r}, which should hold {name!r}, does not exist")
        for name, entry in _open_file(folder / shard).items():
            if name in found:
                raise CheckpointError(f"{entry} is also in {found[name].path.name}")
            found[name] = entry
    for name, shard in placed.items():
        if name not in found or found[name].path.name != shard:
            raise CheckpointError(f"{folder / shard}: tensor {name!r} is missing; {_INDEX} places it there")
    return found


def _read_index(path: Path) -> dict[str, str]:
    """The index's tensor names with the shard of each."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict):
        raise CheckpointError(f"{path}: no weight_map")
    for name, shard in placed.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard:
            raise CheckpointError(f"{path}: tensor {name!r}: {shard!r} is not the name of a file beside the index")
    return placed


def _own_names(found: dict[str, _Stored]) -> dict[str, _Stored]:
    """Tensors by our names: without prefix, without the masks."""
    stored: dict[str, _Stored] = {}
    for name, entry in found.items():
        own = name.removeprefix(_PREFIX)
        if _MASK.fullmatch(own):
            continue
        if own in stored:
            raise CheckpointError(f"{entry} is there twice, with and without the prefix {_PREFIX!r}")
        stored[own] = entry
    return stored


def _drop_tied_head(stored: dict[str, _Stored]) -> None:
    """Some files repeat the token embedding as the head. Raises CheckpointError when that head is another one."""
    head, embedding = stored.pop(_HEAD, None), stored.get(_EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head.tensor, embedding.tensor):
        raise CheckpointError(f"{head} differs from {embedding.name!r} though tie_word_embeddings is true")


def _with_stored_sizes(config: ModelConfig, stored: dict[str, _Stored]) -> ModelConfig:
    """The configuration with the feed-forward sizes that the first layer's tensors have."""
    name, layout = ("h.0.mlp.lin1", "[E, D, S]") if config.has_experts else ("h.0.mlp.c_fc.weight", "[D, S]")
    entry = stored.get(name)
    if entry is None:
        return config  # reported with the other missing tensors
    shape = list(entry.tensor.shape)
    if len(shape) != (3 if config.has_experts else 2) or 0 in shape:
        raise CheckpointError(f"{entry} has shape {shape}, expected {layout}")
    if not config.has_experts:
        return config.replace(n_inner=shape[1])
    routed = shape[0] - config.n_shared_expert
    if config.is_token_choice and routed < config.experts_per_token:
        needed = f"{config.n_shared_expert} shared experts and {config.experts_per_token} routed ones a token"
        raise CheckpointError(f"{entry} has shape {shape}: too few experts for {needed}")
    return config.replace(n_expert=routed, expert_size=shape[2])


def _missing(folder: Path, name: str) -> CheckpointError:
    path = folder / (_SINGLE if (folder / _SINGLE).exists() else _INDEX)
    return CheckpointError(f"{path}: tensor {name!r} is missing")


def _empty_model(config: ModelConfig, stored: dict[str, _Stored], folder: Path) -> Transformer:
    """The model without memory for its weights."""
    last = f"h.{config.n_layer - 1}.ln_1.weight"
    if last not in stored:  # before building: the configuration may ask for millions of layers
        raise _missing(folder, last)
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: sizes that no tensor can have ({error})") from None


def _check(stored: dict[str, _Stored], model: Transformer, folder: Path) -> None:
    """Raises CheckpointError for the first missing, extra, wrongly shaped or not floating-point tensor."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in expected:
        if name not in stored:
            raise _missing(folder, name)
    for name, entry in stored.items():
        if name not in expected:
            raise CheckpointError(f"{entry} is no part of a {model.config.model_type} model of this configuration")
        if list(entry.tensor.shape) != expected[name]:
            raise CheckpointError(f"{entry} has shape {list(entry.tensor.shape)}, expected {expected[name]}")
        if entry.tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{entry} has dtype {entry.tensor.dtype}, which is not a floating-point one")


def save_model(model: Transformer, folder: Path, *, dtype: torch.dtype, shard_bytes: int | None = None) -> None:
    """Writes ``config.json`` and the weights: one file, or shards and an index where they exceed ``shard_bytes``.

    Everything is written aside and then moved into place, ``config.json`` last and the old one removed first: whenever
    the process is killed, the folder holds the old checkpoint, the new one, or none that could be loaded, but no
    mixture. Weight files of an earlier save in the folder's other form are removed. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name if name == _HEAD else _PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    shards = _split(weights, dtype, shard_bytes)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [_SINGLE]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        aside = Path(name)
        model.config.save(aside)
        for file, names in zip(files, shards, strict=True):
            tensors = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in names}
            save_file(tensors, aside / file, metadata={"format": "pt"})
            shutil.copymode(aside / "config.json", aside / file)  # safetensors may write for the owner only
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize},
                "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
            }
            (aside / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
            files.append(_INDEX)
        (folder / "config.json").unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.name in (_SINGLE, _INDEX) or _SHARD.fullmatch(path.name):
                path.unlink()
        for file in (*files, "config.json"):
            os.replace(aside / file, folder / file)


def _split(weights: dict[str, Tensor], dtype: torch.dtype, shard_bytes: int | None) -> list[list[str]]:
    """Names of each shard, in order; a tensor above ``shard_bytes`` has a shard of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in weights.items():
        size = tensor.numel() * dtype.itemsize
        if shard_bytes is not None and shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
