"""Mixing against the layer's equations written out as loops, and what holds of every group."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.mixing import ExpertBank, WholeSequences, mix_groups, mixing_entropy, mixing_weights

WIDTH, EXPERTS, SIZE = 6, 5, 3


def make_bank(
    seed: int = 0, *, over_experts: bool = False, discrete: bool = False, activation: str = "relu"
) -> ExpertBank:
    config = ModelConfig(
        n_embd=WIDTH,
        n_head=1,
        n_expert=EXPERTS,
        expert_size=SIZE,
        emit_softmax_over_experts=over_experts,
        use_discrete_routing=discrete,
        activation_function=activation,
    )
    bank = ExpertBank(config).double().requires_grad_(False)
    torch.manual_seed(seed)
    bank.initialize(1.0, 1.0)
    return bank


def make_members(groups: int, size: int, seed: int = 1) -> Tensor:
    return torch.randn(groups, size, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(values: list[float], temperature: float) -> list[float]:
    top = max(values)
    powers = [math.exp((value - top) / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def one_hot(values: list[float]) -> list[float]:
    return [float(i == values.index(max(values))) for i in range(len(values))]


ACTIVATIONS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


def by_loops(
    bank: ExpertBank, group: Tensor, temperature: float, *, over_experts: bool, discrete: bool, activation: str
) -> list[list[float]]:
    """One group ``[G, D]``, number by number."""
    x: list[list[float]] = group.tolist()
    controller, lin1, lin2 = bank.controller.tolist(), bank.lin1.tolist(), bank.lin2.tolist()
    tokens, experts, width, hidden = range(len(x)), range(EXPERTS), range(WIDTH), range(SIZE)
    sharp = discrete or temperature == 0

    def share(values: list[float]) -> list[float]:
        return one_hot(values) if sharp else softmax(values, temperature)

    scores = [[sum(x[t][d] * controller[d][e] for d in width) for e in experts] for t in tokens]
    over_tokens = [share([scores[t][e] for t in tokens]) for e in experts]  # [e][t]
    emit = [share(scores[t]) if over_experts else [over_tokens[e][t] for e in experts] for t in tokens]  # [t][e]
    out = [[0.0] * WIDTH for _ in tokens]
    for e in experts:
        mix = [sum(over_tokens[e][t] * x[t][d] for t in tokens) for d in width]
        inner = [ACTIVATIONS[activation](sum(mix[d] * lin1[e][d][s] for d in width)) for s in hidden]
        y = [sum(inner[s] * lin2[e][s][d] for s in hidden) for d in width]
        for t, d in itertools.product(tokens, width):
            out[t][d] += emit[t][e] * y[d]
    return out


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("temperature", [0, 0.05, 0.35, 1.0, 3])
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("over_experts", [False, True])
def test_groups_follow_the_equations(over_experts: bool, discrete: bool, temperature: float, activation: str) -> None:
    bank = make_bank(over_experts=over_experts, discrete=discrete, activation=activation)
    members = make_members(3, 4)
    expected = [
        by_loops(bank, group, temperature, over_experts=over_experts, discrete=discrete, activation=activation)
        for group in members
    ]
    torch.testing.assert_close(mix_groups(bank, members, temperature), torch.tensor(expected, dtype=torch.float64))


@given(seed=st.integers(0, 2**31), size=st.integers(1, 9), temperature=st.floats(0.1, 5), over_experts=st.booleans())
def test_any_group_follows_the_equations(seed: int, size: int, temperature: float, over_experts: bool) -> None:
    bank, members = make_bank(seed, over_experts=over_experts), make_members(1, size, seed)
    expected = by_loops(bank, members[0], temperature, over_experts=over_experts, discrete=False, activation="relu")
    actual = mix_groups(bank, members, temperature)[0]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("over_experts", [False, True])
def test_weights_are_shares(over_experts: bool) -> None:
    scores = make_members(2, 7)
    for temperature, discrete in [(0, False), (0.3, False), (1.0, True)]:
        merge, emit = mixing_weights(scores, temperature, over_experts=over_experts, discrete=discrete)
        assert torch.all(merge >= 0) and torch.all(emit >= 0)
        torch.testing.assert_close(merge.sum(1), torch.ones(2, WIDTH, dtype=torch.float64))
        if over_experts:
            torch.testing.assert_close(emit.sum(2), torch.ones(2, 7, dtype=torch.float64))
        else:
            assert torch.equal(merge, emit)


@pytest.mark.parametrize("over_experts", [False, True])
def test_at_temperature_0_each_expert_takes_its_best_token(over_experts: bool) -> None:
    scores = make_members(2, 7)
    cold = mixing_weights(scores, 0, over_experts=over_experts, discrete=False)
    nearly = mixing_weights(scores, 1e-6, over_experts=over_experts, discrete=False)
    for exact, limit in zip(cold, nearly, strict=True):
        assert set(exact.flatten().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(exact, limit)
    assert torch.equal(cold[0].argmax(1), scores.argmax(1))


def test_a_tie_goes_to_the_first() -> None:
    merge, emit = mixing_weights(torch.zeros(1, 4, 3), 0, over_experts=True, discrete=False)
    assert merge[0].tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert emit[0].tolist() == [[1, 0, 0]] * 4


@pytest.mark.parametrize("temperature", [0, 0.5])
@pytest.mark.parametrize("over_experts", [False, True])
@given(order=st.permutations(range(6)))
def test_the_order_of_members_does_not_matter(over_experts: bool, temperature: float, order: list[int]) -> None:
    bank, members = make_bank(over_experts=over_experts), make_members(2, 6)
    expected = mix_groups(bank, members, temperature)[:, order]
    torch.testing.assert_close(mix_groups(bank, members[:, order], temperature), expected)


def test_groups_are_independent() -> None:
    bank, members = make_bank(), make_members(3, 4)
    before = mix_groups(bank, members, 1.0)
    changed = members.clone()
    changed[1] += 1
    after = mix_groups(bank, changed, 1.0)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1], before[1])
    alone = torch.cat([mix_groups(bank, group[None], 1.0) for group in members])
    torch.testing.assert_close(alone, before)


@given(seed=st.integers(0, 2**31), size=st.integers(1, 40), temperature=st.floats(0.01, 10))
def test_entropy_is_between_0_and_1(seed: int, size: int, temperature: float) -> None:
    merge, _ = mixing_weights(make_members(2, size, seed), temperature, over_experts=False, discrete=False)
    entropy = mixing_entropy(merge)
    assert entropy.shape == (2,)
    assert torch.all(entropy >= 0) and torch.all(entropy <= 1 + 1e-9)


def test_entropy_at_its_ends() -> None:
    assert mixing_entropy(torch.full((1, 8, 3), 1 / 8)).item() == pytest.approx(1)
    cold, _ = mixing_weights(make_members(1, 8), 0, over_experts=False, discrete=False)
    assert mixing_entropy(cold).item() == 0
    assert mixing_entropy(torch.ones(4, 1, 3)).tolist() == [0, 0, 0, 0]
    half = torch.tensor([0.5, 0.5, 0, 0])[None, :, None]
    assert mixing_entropy(half).item() == pytest.approx(0.5)


def whole_sequences_by_loops(bank: ExpertBank, x: Tensor, size: int, *, pad: bool) -> Tensor:
    """``x [B, L, D]``: each position, each run of ``size`` sequences, a group of its own."""
    out = torch.empty_like(x)
    for first, position in itertools.product(range(0, x.shape[0], size), range(x.shape[1])):
        live = x[first : first + size, position]
        group = torch.cat((live, live.new_zeros(size - len(live), WIDTH))) if pad else live
        out[first : first + size, position] = mix_groups(bank, group[None], 0.7)[0, : len(live)]
    return out


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 7, 8])
def test_whole_sequences(batch: int) -> None:
    bank, x = make_bank(), make_members(batch, 5)
    config = ModelConfig(group_size=4, temperature=0.7)
    out = WholeSequences(config, batch)(0, bank, x.view(-1, WIDTH))
    torch.testing.assert_close(out.view_as(x), whole_sequences_by_loops(bank, x, 4, pad=True))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8])
def test_whole_sequences_without_padding(batch: int) -> None:
    bank, x = make_bank(), make_members(batch, 5)
    mix = WholeSequences(ModelConfig(group_size=4), batch, temperature=0.7, pad=False)
    out = mix(0, bank, x.view(-1, WIDTH))
    torch.testing.assert_close(out.view_as(x), whole_sequences_by_loops(bank, x, 4, pad=False))


def test_without_padding_groups_are_of_one_size() -> None:
    with pytest.raises(ValueError, match="padding"):
        WholeSequences(ModelConfig(group_size=4), 6, pad=False)


@given(st.integers(0, 2**31), st.floats(0, 100))
def test_int8_keeps_what_is_common_to_all_tokens(seed: int, size: float) -> None:
    """Along it at most half of plain rounding's error is left; no weight errs by more than three quarters of a step."""
    generator = torch.Generator().manual_seed(seed)
    config = ModelConfig(n_embd=32, n_head=4, n_expert=3, expert_size=8, group_size=4)
    bank, plain = ExpertBank(config), ExpertBank(config)
    with torch.no_grad():
        bank.lin1.normal_(generator=generator)
        plain.lin1.copy_(bank.lin1)
    exact, common = bank.lin1.detach().clone(), torch.randn(32, generator=generator) * size
    bank.quantize(common)
    plain.quantize()
    assert bank.scale1 is not None and plain.scale1 is not None and torch.equal(bank.scale1, plain.scale1)
    error, usual = ((each.lin1 * each.scale1[:, None] - exact) / each.scale1[:, None] for each in (bank, plain))
    assert float(error.abs().max()) <= 0.7501 and float(usual.abs().max()) <= 0.5001
    along, before = (torch.einsum("eds,d->es", each, common).abs().mean() for each in (error, usual))
    assert float(along) <= float(before) * 0.5 + 1e-6
    if size == 0:
        assert torch.equal(bank.lin1, plain.lin1)
