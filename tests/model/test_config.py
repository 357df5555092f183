"""config.json: what is read, what is refused, and that an error names file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ACTIVATIONS, ModelConfig
from model.errors import CheckpointError
from model.mixing import ACTIVATION_FUNCTIONS

SIZES = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "group_size", "n_expert"]
FLAGS = ["emit_softmax_over_experts", "use_discrete_routing", "tie_word_embeddings"]


def load(folder: Path, **values: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({"model_type": "mot", **values}))
    return ModelConfig.load(folder)


def test_defaults_are_those_of_hugging_face(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.vocab_size, config.n_positions, config.n_embd, config.n_layer) == (50257, 1024, 768, 12)
    assert (config.group_size, config.n_expert, config.temperature) == (32, 32, 1.0)
    assert config.activation_function == "gelu_new"
    assert config.tie_word_embeddings and not config.use_discrete_routing


def test_derived_sizes() -> None:
    dense = ModelConfig(model_type="gpt2", n_embd=32, n_head=4)
    assert (dense.head_size, dense.hidden_size, dense.expansion, dense.is_mot) == (8, 128, 1.0, False)
    assert dense.replace(n_inner=7).hidden_size == 7
    assert ModelConfig(group_size=16).expansion == 16.0


def test_null_means_the_default_and_unknown_fields_do_not_matter(tmp_path: Path) -> None:
    assert load(tmp_path, temperature=None, n_inner=None, summary_type="cls_index") == ModelConfig()


@given(
    vocab_size=st.integers(1, 10**6),
    heads=st.integers(1, 8),
    head_size=st.integers(1, 64),
    temperature=st.floats(0, 100),
    epsilon=st.floats(1e-12, 1),
    activation=st.sampled_from(ACTIVATIONS),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    vocab_size: int,
    heads: int,
    head_size: int,
    temperature: float,
    epsilon: float,
    activation: str,
    flags: tuple[bool, bool, bool],
) -> None:
    emit_softmax_over_experts, use_discrete_routing, tie_word_embeddings = flags
    config = ModelConfig(
        vocab_size=vocab_size,
        n_embd=heads * head_size,
        n_head=heads,
        temperature=temperature,
        layer_norm_epsilon=epsilon,
        activation_function=activation,
        eos_token_id=vocab_size - 1,
        emit_softmax_over_experts=emit_softmax_over_experts,
        use_discrete_routing=use_discrete_routing,
        tie_word_embeddings=tie_word_embeddings,
    )
    folder = tmp_path_factory.mktemp("config")
    config.save(folder)
    assert ModelConfig.load(folder) == config


@pytest.mark.parametrize("name", SIZES)
@given(value=st.one_of(st.integers(max_value=0), st.floats(), st.booleans(), st.text(max_size=3)))
def test_a_size_is_a_positive_whole_number(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        ModelConfig.from_dict({"model_type": "mot", name: value})


@given(value=st.one_of(st.floats(max_value=-1e-300), st.sampled_from([float("nan"), float("inf"), True, "1", [1]])))
def test_a_temperature_is_a_number_of_at_least_0(value: Any) -> None:
    with pytest.raises(ValueError, match="temperature"):
        ModelConfig.from_dict({"model_type": "mot", "temperature": value})


def test_hugging_faces_default_end_of_text_is_none_in_a_smaller_vocabulary() -> None:
    values = {"model_type": "mot", "bos_token_id": 50256, "eos_token_id": 50256}
    assert ModelConfig.from_dict({**values, "vocab_size": 97}).eos_token_id is None
    assert ModelConfig.from_dict(values).eos_token_id == 50256


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
@given(
    value=st.one_of(
        st.integers(max_value=-1),
        st.integers(10, 50255),
        st.just(True),
        st.just([1]),
    )
)
def test_a_token_id_is_in_the_vocabulary(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        ModelConfig.from_dict({"model_type": "mot", "vocab_size": 10, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "llama"),
        ("model_type", []),
        ("n_head", 5),
        ("activation_function", "tanh"),
        ("activation_function", ["relu"]),
        ("layer_norm_epsilon", 0),
        ("layer_norm_epsilon", "1e-5"),
        *[(name, 1) for name in FLAGS],
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ],
)
def test_a_bad_value_names_file_and_field(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{name}"):
        load(tmp_path, **{name: value})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'"mot"', b"{}"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        ModelConfig.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        ModelConfig.load(tmp_path)


def test_every_activation_that_is_accepted_exists() -> None:
    assert set(ACTIVATION_FUNCTIONS) == set(ACTIVATIONS)
