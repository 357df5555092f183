"""Weights in tiles: the same numbers, each where the order says, and plain forms that compute with them as before."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import tiles
from model.config import ModelConfig
from model.layers import Projection
from model.mixing import ExpertBank


@settings(deadline=None)
@given(
    experts=st.integers(1, 3), rows=st.integers(1, 4), columns=st.integers(1, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.int8]),
)  # fmt: skip
def test_every_weight_is_where_the_order_says_and_comes_back(
    experts: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    together = 4 // dtype.itemsize
    terms = 16 * together
    K, N = terms * rows, 64 * columns
    weight = torch.arange(experts * K * N).view(experts, K, N).remainder(251).sub(125).to(dtype)
    put = tiles.to_tiles(weight)
    assert put.shape == weight.shape and torch.equal(tiles.from_tiles(put), weight)
    places = put.view(experts, 2 * columns, rows, 2, 16, 16, together)
    for expert in range(experts):
        assert torch.equal(tiles.to_tiles(weight[expert]), put[expert])
        for k in (0, 1, 17, K - 1):
            for n in (0, 5, 16, N - 1):
                word = k % terms // together
                place = (expert, n // 32, k // terms, n % 32 // 16, word, n % 16, k % together)
                assert places[place] == weight[expert, k, n]
    first, second = tiles.side_by_side(weight, weight.transpose(1, 2))
    assert torch.equal(first, put) and torch.equal(second, tiles.to_tiles(weight.transpose(1, 2)))
    tiles.put_in_tiles(weight)
    assert torch.equal(weight, put)


@pytest.mark.parametrize(
    ("width", "size", "quantized", "fits"),
    [
        (64, 32, False, True), (64, 24, False, True), (32, 72, False, True), (64, 40, False, False),
        (64, 16, False, False), (48, 32, False, False), (64, 64, True, True), (64, 50, True, True),
        (64, 42, True, False), (32, 64, True, False),
    ],
)  # fmt: skip
def test_plain_forms_compute_with_weights_in_tiles(width: int, size: int, quantized: bool, fits: bool) -> None:
    config = ModelConfig(
        vocab_size=8, n_positions=6, n_embd=width, n_layer=1, n_head=1, group_size=2, n_expert=3, expert_size=size
    )
    torch.manual_seed(0)
    bank, projection = (
        ExpertBank(config).requires_grad_(False),
        Projection(width, 96 if fits else 40).requires_grad_(False),
    )
    bank.initialize(1, 1)
    projection.initialize(1)
    if quantized:
        bank.quantize()
    for parameter in (*projection.parameters(), *bank.parameters()):
        if parameter.dtype is torch.float32:
            parameter.data = parameter.data.bfloat16()
    before = copy.deepcopy(bank), copy.deepcopy(projection)
    terms = 64 if quantized else 32
    for _ in range(2):  # the second time nothing is left to do
        bank.put_in_tiles(), projection.put_in_tiles()
        assert bank.in_tiles is projection.in_tiles is fits
        assert torch.equal(bank.lin1, before[0].lin1) is not fits
        assert bank.lin1.shape[2] == bank.lin2.shape[1] == (-(-size // terms) * terms if fits else size)
        assert bank.lin1.numel() + bank.lin2.numel() - bank.filled_up == 2 * before[0].lin1.numel()
    mixes, x = torch.randn(3, 4, width).bfloat16(), torch.randn(4, width).bfloat16()
    assert torch.equal(bank.experts(mixes), before[0].experts(mixes))
    assert torch.equal(bank.part(2).experts(mixes[:2]), before[0].part(2).experts(mixes[:2]))
    for expert in range(3):
        for found, plain in zip(bank.expert(expert), before[0].expert(expert), strict=True):
            assert torch.equal(found, plain)
    assert torch.equal(projection(x), before[1](x))
    for _ in range(2):
        bank.put_in_order(), projection.put_in_order()
        assert not bank.in_tiles and not projection.in_tiles
        assert torch.equal(bank.lin1, before[0].lin1) and torch.equal(bank.lin2, before[0].lin2)
        assert torch.equal(projection.weight, before[1].weight)
    answers = bank.float().experts(mixes.float())
    bank.widen(torch.float32)
    assert bank.lin1.dtype is torch.float32 and bank.scale1 is None
    torch.testing.assert_close(bank.experts(mixes.float()), answers, atol=1e-3, rtol=1e-3)


def test_only_models_in_bfloat16_are_put_in_tiles() -> None:
    projection = Projection(32, 32)
    projection.put_in_tiles()
    assert not projection.in_tiles
    bank = ExpertBank(
        ModelConfig(
            vocab_size=8, n_positions=6, n_embd=64, n_layer=1, n_head=1, group_size=2, n_expert=3, expert_size=64
        )
    )
    bank.initialize(1, 1)
    bank.quantize()
    bank.put_in_tiles()
    assert not bank.in_tiles
