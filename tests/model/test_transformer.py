"""The decoder: dense GPT-2 against a reference written apart from it, and that no token sees a later one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.attention import attend_whole_sequences
from model.config import ModelConfig
from model.mixing import WholeSequences
from model.transformer import Transformer

DENSE = ModelConfig(model_type="gpt2", vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=4, n_inner=24)
MOT = DENSE.replace(model_type="mot", group_size=3, n_expert=4, expert_size=8)
UNTIED = DENSE.replace(tie_word_embeddings=False, activation_function="relu", layer_norm_epsilon=1e-2)


def make(config: ModelConfig) -> Transformer:
    """A model with nothing at its initial 0 or 1."""
    model = Transformer(config).double().requires_grad_(False)
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


def forward(model: Transformer, ids: Tensor) -> Tensor:
    """``ids [B, L]`` to logits ``[B, L, V]``."""
    batch, length = ids.shape
    hidden = model(
        ids.flatten(),
        torch.arange(length).repeat(batch),
        lambda layer, qkv: attend_whole_sequences(qkv, batch, model.config.n_head),
        WholeSequences(model.config, batch),
    )
    return model.logits(hidden).view(batch, length, -1)


def make_ids(batch: int, length: int) -> Tensor:
    return torch.randint(DENSE.vocab_size, (batch, length), generator=torch.Generator().manual_seed(5))


def gpt2(config: ModelConfig, weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """One sequence through GPT-2 as it is described, token by token and head by head: ``[L, V]``."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean()
        scaled = centred / torch.sqrt((centred**2).mean() + config.layer_norm_epsilon)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def activation(x: Tensor) -> Tensor:
        if config.activation_function == "relu":
            return x.clamp(min=0)
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    stream = [weights["wte.weight"][token] + weights["wpe.weight"][place] for place, token in enumerate(ids)]
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        parts = [affine(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3) for x in stream]
        for place in range(len(ids)):
            heads = []
            for h in range(config.n_head):
                mine = slice(h * config.head_size, (h + 1) * config.head_size)
                scores = [float(parts[place][0][mine] @ key[mine]) for _, key, _ in parts[: place + 1]]
                powers = [math.exp(score / math.sqrt(config.head_size)) for score in scores]
                values = [
                    value[mine] * (power / sum(powers)) for power, (*_, value) in zip(powers, parts, strict=False)
                ]
                heads.append(torch.stack(values).sum(0))
            stream[place] = stream[place] + affine(torch.cat(heads), f"{block}.attn.c_proj")
        for place, x in enumerate(stream):
            inner = activation(affine(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
            stream[place] = x + affine(inner, f"{block}.mlp.c_proj")
    head = weights["wte.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return torch.stack([head @ norm(x, "ln_f") for x in stream])


@pytest.mark.parametrize("config", [DENSE, UNTIED, DENSE.replace(n_inner=None)], ids=["tied", "untied", "default"])
def test_dense_gpt2(config: ModelConfig) -> None:
    model, ids = make(config), make_ids(3, 7)
    weights = dict(model.state_dict())
    expected = torch.stack([gpt2(config, weights, sequence) for sequence in ids.tolist()])
    torch.testing.assert_close(forward(model, ids), expected)


@pytest.mark.parametrize("config", [DENSE, MOT], ids=["gpt2", "mot"])
@pytest.mark.parametrize("place", [1, 5, 8])
def test_a_token_does_not_see_a_later_one(config: ModelConfig, place: int) -> None:
    """Neither its own sequence's nor, through mixing, a companion's."""
    model, ids = make(config), make_ids(4, 9)
    before = forward(model, ids)
    changed = ids.clone()
    changed[1, place:] = (changed[1, place:] + 1) % config.vocab_size
    after = forward(model, changed)
    assert torch.equal(after[:, :place], before[:, :place])
    assert not torch.allclose(after[1, place], before[1, place])


def test_mixing_is_between_companions_of_one_group() -> None:
    model, ids = make(MOT), make_ids(6, 9)
    before = forward(model, ids)
    ids[1, 4] = (ids[1, 4] + 1) % MOT.vocab_size
    after = forward(model, ids)
    assert not torch.allclose(after[0, 4:], before[0, 4:]), "a companion of the same group"
    torch.testing.assert_close(after[3:], before[3:])  # another group


@pytest.mark.parametrize("config", [DENSE, UNTIED], ids=["gpt2", "untied"])
def test_dense_sequences_are_independent(config: ModelConfig) -> None:
    model, ids = make(config), make_ids(3, 6)
    alone = torch.cat([forward(model, sequence[None]) for sequence in ids])
    torch.testing.assert_close(alone, forward(model, ids))


def test_initialization_is_a_function_of_the_seed() -> None:
    models = [Transformer(MOT) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.initialize(seed)
    first, second, other = ({k: v.clone() for k, v in model.state_dict().items()} for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["h.0.mlp.lin1"], other["h.0.mlp.lin1"])
    assert all(tensor.isfinite().all() for tensor in first.values())
    ratio = first["h.0.mlp.lin2"].std() / first["h.0.mlp.lin1"].std()
    assert ratio.item() == pytest.approx(1 / math.sqrt(2 * MOT.n_layer), rel=0.2)


def test_properties() -> None:
    model = Transformer(MOT)
    assert len(model.banks) == len(model.blocks) == MOT.n_layer
    assert Transformer(DENSE).banks == []
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    bank = 16 * 4 + 2 * 4 * 16 * 8
    block = 4 * 16 + (16 * 48 + 48) + (16 * 16 + 16) + bank
    assert model.parameter_count == (31 + 12) * 16 + 2 * block + 2 * 16
    assert Transformer(UNTIED).parameter_count == Transformer(DENSE).parameter_count + 31 * 16
