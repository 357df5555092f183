"""Token choice and Expert Choice against their definitions; what training adds; that rows are independent."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.groups import Fill, PrivateRows
from model.mixing import ExpertBank, mix_groups
from model.native import Kernels, NativeUnavailable, open_kernels
from model.reference import ReferenceCrowd
from model.token_choice import (
    TokenChoice,
    TrainedTokenChoice,
    balance_loss,
    chosen_experts,
    within_capacity,
)
from tests.model.kinds import EXPERT_CHOICE, SWITCH, TOKEN_CHOICE, TOP_K, expert_choice_by_hand, token_choice_by_hand


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    try:
        return open_kernels()
    except NativeUnavailable as error:
        pytest.skip(str(error))


def _bank(config: ModelConfig, seed: int = 0) -> ExpertBank:
    bank = ExpertBank(config)
    torch.manual_seed(seed)
    bank.initialize(0.3, 0.3)
    return bank.requires_grad_(False)


def _rows(count: int, seed: int = 1, width: int = SWITCH.n_embd) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


token_choice = st.builds(
    lambda experts, extra, shared, size, normalize: SWITCH.replace(
        model_type="top-k", n_expert=experts + extra, experts_per_token=experts, n_shared_expert=shared,
        expert_size=size, normalize_gates=normalize and experts > 1,
    ),
    st.integers(1, 5), st.integers(0, 9), st.integers(0, 3), st.integers(1, 20), st.booleans(),
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(config=st.one_of(st.just(SWITCH), token_choice), rows=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_form_is_the_definition(kernels: Kernels, config: ModelConfig, rows: int, seed: int) -> None:
    bank, x = _bank(config, seed), _rows(rows, seed)
    wanted = token_choice_by_hand(bank, x)
    for mix in (TokenChoice(), TokenChoice(kernels), TokenChoice(tiled=True), TrainedTokenChoice(None)):
        torch.testing.assert_close(mix(0, bank, x), wanted, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(
    config=st.one_of(st.just(SWITCH), token_choice),
    rows=st.integers(1, 19),
    place=st.integers(0, 18),
    native=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_a_rows_bits_depend_on_that_row_alone(
    kernels: Kernels, config: ModelConfig, rows: int, place: int, native: bool, dtype: torch.dtype, seed: int
) -> None:
    """With kernels whatever the number of rows; the plain form in tiles of a constant number of them."""
    bank, mine = _bank(config, seed).to(dtype), _rows(1, seed).to(dtype)
    mix = TokenChoice(kernels) if native else TokenChoice(tiled=True)
    rows = rows if native else 8
    place %= rows
    crowded = _rows(rows, seed + 1).to(dtype)
    crowded[place] = mine[0]
    lonely = torch.zeros(1 if native else 8, config.n_embd, dtype=dtype)
    lonely[0] = mine[0]
    assert torch.equal(mix(0, bank, crowded)[place], mix(0, bank, lonely)[0])


@pytest.mark.parametrize("config", [SWITCH, TOP_K], ids=["switch", "top-k"])
def test_ties_go_to_the_lowest_expert(kernels: Kernels, config: ModelConfig) -> None:
    bank = _bank(config)
    bank.controller.zero_()
    used = chosen_experts(torch.zeros(40, config.n_expert), config.experts_per_token)
    assert used[:, : config.experts_per_token].all() and used.sum() == 40 * config.experts_per_token
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]])
    assert chosen_experts(scores, 3).nonzero()[:, 1].tolist() == [1, 2, 3]
    x = _rows(3)
    for mix in (TokenChoice(kernels), TokenChoice(tiled=True)):
        torch.testing.assert_close(mix(0, bank, x), token_choice_by_hand(bank, x), atol=1e-4, rtol=1e-4)


@given(rows=st.integers(1, 30), experts=st.integers(1, 8), seed=st.integers(0, 99), data=st.data())
def test_the_balance_loss_by_a_loop(rows: int, experts: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, experts))
    scores = _rows(rows, seed, experts)
    probabilities = torch.softmax(scores, 1)
    total = 0.0
    for e in range(experts):
        chose, probability = 0, 0.0
        for row in range(rows):
            better = sum(
                bool(scores[row, other] > scores[row, e] or (scores[row, other] == scores[row, e] and other < e))
                for other in range(experts)
            )
            chose += better < count
            probability += float(probabilities[row, e])
        total += experts / (count * rows) * chose * probability / rows
    found = balance_loss(probabilities, chosen_experts(scores, count))
    assert float(found) == pytest.approx(total, rel=1e-4)


def test_an_even_balance_loss_is_1_and_the_worst_is_the_number_of_experts() -> None:
    even = torch.eye(4).repeat(3, 1)
    assert float(balance_loss(even, even > 0)) == pytest.approx(1)
    worst = torch.tensor([[1.0, 0, 0, 0]]).repeat(5, 1)
    assert float(balance_loss(worst, worst > 0)) == pytest.approx(4)


@given(rows=st.integers(1, 40), experts=st.integers(1, 6), factor=st.floats(0.1, 3), seed=st.integers(0, 99))
def test_capacity_by_a_loop(rows: int, experts: int, factor: float, seed: int) -> None:
    chosen = chosen_experts(_rows(rows, seed, experts), 1)
    capacity = math.ceil(factor * rows / experts)
    taken = [0] * experts
    for row, kept in zip(chosen, within_capacity(chosen, factor), strict=True):
        (expert,) = row.nonzero().flatten().tolist()
        assert kept.nonzero().flatten().tolist() == ([expert] if taken[expert] < capacity else [])
        taken[expert] += 1


def test_only_training_drops(kernels: Kernels) -> None:
    bank = _bank(SWITCH)
    bank.controller.zero_()  # every token goes to expert 0
    x = _rows(20)
    wanted = token_choice_by_hand(bank, x)
    dropped = TrainedTokenChoice(1.25)(0, bank, x)
    torch.testing.assert_close(dropped[:5], wanted[:5])  # 20 / 5 * 1.25
    assert not dropped[5:].any()
    for mix in (TokenChoice(), TokenChoice(kernels), TokenChoice(tiled=True)):
        torch.testing.assert_close(mix(0, bank, x), wanted, atol=1e-5, rtol=1e-5)


def test_what_is_dropped_does_not_depend_on_later_rows() -> None:
    """A sequence must not see its own future through a capacity."""
    bank, x = _bank(SWITCH), _rows(20)
    later = x.clone()
    later[12:] = _rows(8, seed=5)
    before, after = (TrainedTokenChoice(0.6)(0, bank, rows) for rows in (x, later))
    torch.testing.assert_close(before[:12], after[:12])
    assert (before == 0).all(1).any() and not torch.equal(before[12:], after[12:])


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_gradients_reach_router_and_experts(name: str) -> None:
    bank = ExpertBank(TOKEN_CHOICE[name])
    torch.manual_seed(0)
    bank.initialize(0.3, 0.3)
    mix = TrainedTokenChoice(1.25)
    mix(0, bank, _rows(40)).square().sum().backward()
    for parameter in (bank.controller, bank.lin1, bank.lin2):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    bank.zero_grad()
    mix(0, bank, _rows(40))
    mix.balance[-1].backward()  # type: ignore[no-untyped-call]
    assert bank.controller.grad is not None and bank.controller.grad.abs().sum() > 0
    assert bank.lin1.grad is None


# Expert Choice


@settings(deadline=None, max_examples=30)
@given(experts=st.integers(1, 9), group=st.integers(1, 6), count=st.integers(1, 4), seed=st.integers(0, 99))
def test_expert_choice_is_the_definition(experts: int, group: int, count: int, seed: int) -> None:
    config = EXPERT_CHOICE.replace(n_expert=experts, group_size=group)
    bank = _bank(config, seed)
    members = _rows(count * group, seed).view(count, group, -1)
    found = mix_groups(bank, members, config.temperature)
    wanted = torch.stack([expert_choice_by_hand(bank, one) for one in members])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fill", ["reference", "zeros", "none"])
@pytest.mark.parametrize("native", [False, True])
def test_a_private_token_of_expert_choice_beside_the_crowd(fill: str, native: bool, kernels: Kernels) -> None:
    """It gets what the definition gives it in a group with the first G - 1 reference members."""
    config, size = EXPERT_CHOICE.replace(n_layer=1), EXPERT_CHOICE.group_size
    bank = _bank(config)
    activations = torch.randn(1, 7, size, config.n_embd, generator=torch.Generator().manual_seed(2))
    crowd = ReferenceCrowd(activations, [bank], fingerprint=None)
    built = Fill.build(fill, config, [bank], crowd)  # type: ignore[arg-type]
    x, positions = _rows(7), torch.arange(7)
    rows = PrivateRows(
        config, built, positions=positions, temperatures=torch.zeros(7), skip_below=torch.zeros(7),
        live=torch.ones(7, dtype=torch.bool), kernels=kernels if native else None,
    )  # fmt: skip
    found = rows(0, bank, x)
    others = {"reference": activations[0], "zeros": torch.zeros_like(activations[0]), "none": activations[0, :, :1]}
    for row in range(7):
        members = x[row : row + 1]
        if fill != "none":
            # At a tie the private token loses, so that only what it wins counts: rivals stand first.
            members = torch.cat((others[fill][row, : size - 1], members))
        torch.testing.assert_close(found[row], expert_choice_by_hand(bank, members)[-1], atol=1e-4, rtol=1e-4)
    assert 0 < float(rows.experts_used.float().mean()) <= config.n_expert
