"""Checkpoint folders: what is saved comes back, and foreign forms are read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.errors import CheckpointError
from model.transformer import Transformer
from tests.model.checkpoints import DENSE, INDEX, MOT, WEIGHTS, Edit, edit, edit_config, make


def same(a: Transformer, b: Transformer, dtype: torch.dtype = torch.float32) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name].to(dtype), right[name]) for name in left)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(make(), tmp_path, dtype=torch.float32)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(make(), tmp_path, dtype=torch.float32, shard_bytes=2000)
    return tmp_path


@pytest.mark.parametrize("shard_bytes", [None, 1, 2000, 10**9])
@pytest.mark.parametrize("config", [MOT, DENSE, MOT.replace(tie_word_embeddings=False)], ids=["mot", "gpt2", "untied"])
def test_what_is_saved_comes_back(tmp_path: Path, config: ModelConfig, shard_bytes: int | None) -> None:
    model = make(config)
    save_model(model, tmp_path / "deep" / "folder", dtype=torch.float32, shard_bytes=shard_bytes)
    loaded = load_model(tmp_path / "deep" / "folder")
    assert same(model, loaded)
    assert loaded.config == config
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_dtypes(tmp_path: Path) -> None:
    model = make()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    assert same(model, load_model(tmp_path), torch.bfloat16)
    assert load_model(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert model.dtype == torch.float32, "saving leaves the model as it was"


def test_mixed_dtypes_become_that_of_the_embedding(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"transformer.ln_f.weight": torch.ones(8, dtype=torch.float64)}))
    assert {parameter.dtype for parameter in load_model(folder).parameters()} == {torch.float32}


def test_files_are_as_hugging_face_writes_them(sharded: Path) -> None:
    names = sorted(path.name for path in sharded.iterdir())
    shards = names[1:-1]
    assert names[0] == "config.json" and names[-1] == INDEX and len(shards) > 2
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = json.loads((sharded / INDEX).read_text())
    for shard in shards:
        for name, tensor in load_file(sharded / shard).items():
            assert name.startswith("transformer.") and index["weight_map"].pop(name) == shard
            index["metadata"]["total_size"] -= tensor.nbytes
    assert index == {"metadata": {"total_size": 0}, "weight_map": {}}


def test_a_save_replaces_the_other_form_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    first, second = make(), make()
    second.initialize(seed=2)
    for model, shard_bytes in ((first, 500), (second, None), (first, 2000), (second, 500)):
        save_model(model, tmp_path, dtype=torch.float32, shard_bytes=shard_bytes)
        assert same(model, load_model(tmp_path))
        assert (tmp_path / WEIGHTS).exists() == (shard_bytes is None) != (tmp_path / INDEX).exists()
    assert (tmp_path / "tokenizer.json").exists()
    counts = {path.name[-18:] for path in tmp_path.glob("model-*-of-*")}
    assert len(counts) == 1, "shards of an earlier save are gone"


@pytest.mark.parametrize(("before", "after"), [(None, 500), (500, None), (500, 501), (None, None)])
def test_a_save_that_is_killed_leaves_no_mixture(
    before: int | None, after: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any of its changes to the folder."""
    first, second = make(), make(MOT.replace(temperature=0.5))
    second.initialize(seed=2)
    left = 0

    def counted(change: Callable[..., None]) -> Callable[..., None]:
        def counting(*arguments: Any, **more: Any) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            change(*arguments, **more)

        return counting

    found = set()
    for changes in range(60):
        folder = tmp_path / str(changes)
        save_model(first, folder, dtype=torch.float32, shard_bytes=before)
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            left = changes
            patched.setattr(os, "replace", counted(os.replace))
            patched.setattr(Path, "unlink", counted(Path.unlink))
            save_model(second, folder, dtype=torch.float32, shard_bytes=after)
        try:
            loaded = load_model(folder)
        except CheckpointError as error:
            assert "config.json: not found" in str(error)
            found.add("none")
            continue
        wanted = second if loaded.config.temperature == 0.5 else first
        assert same(wanted, loaded)
        found.add("new" if wanted is second else "old")
    assert found == {"old", "none", "new"}


def test_whoever_may_read_one_file_may_read_all(sharded: Path) -> None:
    assert len({path.stat().st_mode for path in sharded.iterdir()}) == 1


def test_a_failed_save_leaves_the_old_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_model(folder)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("model.checkpoint.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_model(make(DENSE), folder, dtype=torch.float32)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]
    assert same(before, load_model(folder))


def test_a_model_can_be_saved_over_the_file_it_is_mapped_from(folder: Path) -> None:
    loaded = load_model(folder)
    save_model(loaded, folder, dtype=torch.float32)
    assert same(loaded, load_model(folder))


def mapped_file(tensor: Tensor) -> str:
    """The file that the memory of a tensor is mapped from; empty where it is not."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5) if line.count(" ") >= 5 else (line.split()[0], "")
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return path.strip()
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("shard_bytes", [None, 2000])
def test_weights_stay_mapped(tmp_path: Path, shard_bytes: int | None) -> None:
    """No copy of the weights in memory; one that is converted is in memory once."""
    save_model(make(), tmp_path, dtype=torch.float32, shard_bytes=shard_bytes)
    loaded = load_model(tmp_path)
    assert all(Path(mapped_file(p)).parent == tmp_path for p in loaded.parameters())
    converted = load_model(tmp_path, dtype=torch.bfloat16)
    assert not any(mapped_file(p).endswith(".safetensors") for p in converted.parameters())


def test_writing_to_the_weights_leaves_the_file(folder: Path) -> None:
    before = (folder / WEIGHTS).read_bytes()
    loaded = load_model(folder)
    for parameter in loaded.parameters():
        parameter.zero_()
    assert (folder / WEIGHTS).read_bytes() == before


def without_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def with_masks(tensors: dict[str, Tensor]) -> None:
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)


def with_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()


@pytest.mark.parametrize("config", [MOT, DENSE], ids=["mot", "gpt2"])
@pytest.mark.parametrize("change", [without_prefix, with_masks, with_head])
def test_foreign_forms(tmp_path: Path, config: ModelConfig, change: Edit) -> None:
    save_model(make(config), tmp_path, dtype=torch.float32)
    edit(tmp_path, change)
    assert same(make(config), load_model(tmp_path))


def test_sizes_come_from_the_tensors(folder: Path) -> None:
    edit_config(folder, n_expert=99, expert_size=4096, n_inner=17)
    config = load_model(folder).config
    assert (config.n_expert, config.expert_size) == (3, 5)
    save_model(make(DENSE), folder, dtype=torch.float32)
    edit_config(folder, n_inner=None)
    assert load_model(folder).config.n_inner == 12
