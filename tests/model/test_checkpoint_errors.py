"""A broken checkpoint is refused with an error that names the file and the tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import load_model, save_model
from model.errors import CheckpointError
from tests.model.checkpoints import DENSE, INDEX, WEIGHTS, edit, edit_config, make


def refused(folder: Path, *parts: str) -> None:
    """Loading raises CheckpointError whose message has all the parts: file and tensor among them."""
    with pytest.raises(CheckpointError) as raised:
        load_model(folder)
    for part in parts:
        assert part in str(raised.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(make(), tmp_path, dtype=torch.float32)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(make(), tmp_path, dtype=torch.float32, shard_bytes=2000)
    return tmp_path


BANK = "transformer.h.{}.mlp.{}"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.wte.weight", (24, 8)),
        ("transformer.wpe.weight", (8, 9)),
        ("transformer.ln_f.weight", (8, 1)),
        ("transformer.h.1.attn.c_attn.weight", (24, 8)),
        (BANK.format(0, "lin1"), (3, 40)),
        (BANK.format(0, "lin1"), (3, 8, 0)),
        (BANK.format(1, "lin1"), (3, 8, 6)),
        (BANK.format(1, "lin1"), (4, 8, 5)),
        (BANK.format(0, "lin2"), (3, 8, 5)),
        (BANK.format(1, "lin2"), (3, 5)),
        (BANK.format(0, "controller"), (3, 8)),
        (BANK.format(1, "controller"), (8, 4)),
    ],
)
def test_a_wrong_shape_is_named(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    refused(folder, WEIGHTS, name, "shape")


@pytest.mark.parametrize(
    ("name", "shape"), [("h.0.mlp.c_fc.weight", (8,)), ("h.1.mlp.c_fc.weight", (8, 13)), ("h.0.mlp.c_proj.bias", (9,))]
)
def test_a_wrong_shape_of_a_dense_model_is_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    save_model(make(DENSE), tmp_path, dtype=torch.float32)
    edit(tmp_path, lambda tensors: tensors.update({f"transformer.{name}": torch.zeros(shape)}))
    refused(tmp_path, WEIGHTS, f"transformer.{name}", "shape")


NAMES = [*make().state_dict()]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    edit(folder, lambda tensors: tensors.pop(f"transformer.{name}"))
    refused(folder, WEIGHTS, name, "missing")


@pytest.mark.parametrize("name", ["extra", "transformer.h.2.ln_1.weight", "transformer.h.0.mlp.c_fc.weight"])
def test_an_extra_tensor_is_named(folder: Path, name: str) -> None:
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    refused(folder, WEIGHTS, name, "no part")


def test_a_tensor_with_and_without_prefix_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"ln_f.bias": torch.zeros(8)}))
    refused(folder, WEIGHTS, "ln_f.bias", "twice")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_a_wrong_dtype_is_named(folder: Path, dtype: torch.dtype) -> None:
    name = "transformer.h.1.ln_2.bias"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(8).to(dtype)}))
    refused(folder, WEIGHTS, name, "dtype")


def test_heads(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(23, 8)}))
    refused(folder, WEIGHTS, "lm_head.weight", "tie_word_embeddings")
    edit_config(folder, tie_word_embeddings=False)
    assert load_model(folder).lm_head is not None
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, WEIGHTS, "lm_head.weight", "missing")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    refused(folder, str(folder / WEIGHTS), "truncated")


def test_a_file_that_is_something_else_is_named(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04" * 100)
    refused(folder, str(folder / WEIGHTS))


def test_missing_files_are_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, str(folder / WEIGHTS), "not found")
    (folder / "config.json").unlink()
    refused(folder, str(folder / "config.json"), "not found")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("n_layer", 10**9, f"h.{10**9 - 1}.ln_1.weight"),
        ("n_embd", 2**62, "config.json"),
        ("vocab_size", 22, "wte.weight"),
        ("n_layer", 1, "h.1."),
        ("activation_function", "tanh", "config.json: activation_function"),
        ("model_type", "gpt2", "h.0.mlp.c_fc.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_named(folder: Path, field: str, value: object, named: str) -> None:
    edit_config(folder, **{field: value})
    refused(folder, str(folder), named)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    second = shards(sharded)[1]
    (lost, *_) = load_file(sharded / second)
    (sharded / second).unlink()
    refused(sharded, INDEX, second, "does not exist")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = {lost: second}
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, INDEX, second, lost)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sharded / shards(sharded)[-1]
    shard.write_bytes(shard.read_bytes()[:-7])
    refused(sharded, str(shard), "truncated")


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    first, second, *_ = shards(sharded)
    (name, *_) = load_file(sharded / first)
    edit(sharded, lambda tensors: tensors.update({name: torch.zeros(1)}), second)
    refused(sharded, first, second, name)


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    first = shards(sharded)[0]
    (name, *_) = load_file(sharded / first)
    edit(sharded, lambda tensors: tensors.pop(name), first)
    refused(sharded, first, name, "missing")


def test_a_tensor_in_no_shard_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name = "transformer.h.1.ln_2.bias"
    shard = index["weight_map"].pop(name)
    (sharded / INDEX).write_text(json.dumps(index))
    edit(sharded, lambda tensors: tensors.pop(name), shard)
    refused(sharded, INDEX, "h.1.ln_2.bias", "missing")


BAD_SHARDS = ["3", '""', '".."', '"../model.safetensors"']


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": []}', *[f'{{"weight_map": {{"x": {shard}}}}}' for shard in BAD_SHARDS]],
)
def test_a_broken_index_is_named(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    refused(sharded, str(sharded / INDEX))
