"""Checkpoint folders: what is saved comes back, foreign forms are read, and a broken one is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.errors import CheckpointError
from model.transformer import Transformer

MOT = ModelConfig(vocab_size=23, n_positions=8, n_embd=8, n_layer=2, n_head=2, group_size=2, n_expert=3, expert_size=5)
DENSE = MOT.replace(model_type="gpt2", n_inner=12)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Edit = Callable[[dict[str, Tensor]], object]


def make(config: ModelConfig = MOT) -> Transformer:
    model = Transformer(config)
    model.initialize(seed=1)
    return model


def same(a: Transformer, b: Transformer, dtype: torch.dtype = torch.float32) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name].to(dtype), right[name]) for name in left)


def edit(folder: Path, change: Edit, file: str = WEIGHTS) -> None:
    """Rewrites one file with its tensors changed."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


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
