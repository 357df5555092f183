"""The compiled products against their plain twins, and their promise: a row's bits depend on that row alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import Projection
from model.mixing import Activation, ExpertBank, _gelu_tanh
from model.native import Kernels, NativeUnavailable
from model.native.arithmetic import NativeArithmetic
from model.native.binding import activation_kind
from model.transformer import Transformer
from tests.model.native.inputs import DTYPES, dtypes, random_of, types


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70), inner=st.integers(1, 300), outer=st.integers(1, 330), by_output=st.booleans(),
    exact=st.booleans(), dtype=dtypes,
)  # fmt: skip
def test_linear(
    variant: Kernels, rows: int, inner: int, outer: int, by_output: bool, exact: bool, dtype: torch.dtype
) -> None:
    x, bias = random_of(rows, inner), random_of(outer, seed=1).to(dtype)
    if not exact:
        x = x.to(dtype).float()  # products in bfloat16 round what they are given
    weight = random_of(*((outer, inner) if by_output else (inner, outer)), seed=2).to(dtype)
    found = variant.linear(x, weight, bias, by_output=by_output, exact=exact)
    plain = torch.addmm(bias.float(), x, weight.float().t() if by_output else weight.float())
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    onto = random_of(rows, outer, seed=3)
    added = variant.linear(x, weight, bias, by_output=by_output, exact=exact, onto=onto)
    torch.testing.assert_close(added, found + onto)
    for row in {0, rows // 2, rows - 1}:
        alone = variant.linear(x[row : row + 1], weight, bias, by_output=by_output, exact=exact)
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "outer"), [(96, 192), (64, 81), (131, 75)])
def test_a_row_is_the_same_among_any_number(
    variant: Kernels, dtype: torch.dtype, by_output: bool, inner: int, outer: int
) -> None:
    x = random_of(70, inner)
    weight = random_of(*((outer, inner) if by_output else (inner, outer)), seed=2).to(dtype)
    singles = torch.cat([variant.linear(row[None], weight, None, by_output=by_output) for row in x])
    for rows in range(1, 71):
        assert torch.equal(variant.linear(x[:rows], weight, None, by_output=by_output), singles[:rows])


def _bank(experts: int, width: int, size: int, dtype: torch.dtype) -> tuple[ExpertBank, Tensor, Tensor]:
    """A bank and its weights in float32."""
    config = ModelConfig(
        vocab_size=8, n_positions=6, n_embd=width, n_layer=1, n_head=1, group_size=2, n_expert=experts,
        expert_size=size,
    )  # fmt: skip
    bank = ExpertBank(config).requires_grad_(False)
    torch.manual_seed(1)
    bank.initialize(1, 1)
    if dtype is not torch.int8:
        bank.to(dtype)
        return bank, bank.lin1.float(), bank.lin2.float()
    bank.quantize()
    assert bank.scale1 is not None and bank.scale2 is not None
    return bank, bank.lin1 * bank.scale1[:, None], bank.lin2 * bank.scale2[:, None]


@settings(deadline=None, max_examples=30)
@given(
    experts=st.integers(1, 9), rows=st.integers(1, 9), width=st.integers(1, 140), size=st.integers(1, 140), dtype=types
)
def test_bank(variant: Kernels, experts: int, rows: int, width: int, size: int, dtype: torch.dtype) -> None:
    mixes = random_of(experts, rows, width)
    bank, lin1, lin2 = _bank(experts, width, size, dtype)
    loose = 1e-3
    if dtype is torch.bfloat16:
        mixes, loose = mixes.bfloat16().float(), 2**-8  # what is hidden is rounded too
    for activation in (F.gelu, F.relu, F.silu):
        bank.activation = activation
        found = variant.bank(mixes, bank)
        scores = torch.bmm(mixes, lin1)
        hidden = activation(scores)
        # Far below zero activations are exact to some digits of what they are of, not of themselves.
        rounding = 1e-6 * float(torch.bmm(scores.abs(), lin2.abs()).max())
        plain, terms = torch.bmm(hidden, lin2), torch.bmm(hidden.abs(), lin2.abs())
        atol = loose * float(terms.max()) + rounding
        torch.testing.assert_close(found, plain, atol=atol, rtol=0)
        if dtype is not torch.bfloat16:
            torch.testing.assert_close(bank.experts(mixes), plain, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize(("width", "size"), [(64, 96), (45, 131)])
def test_a_mix_is_answered_alike_among_any_number(variant: Kernels, dtype: torch.dtype, width: int, size: int) -> None:
    bank, _, _ = _bank(2, width, size, dtype)
    mixes = random_of(2, 70, width)
    singles = torch.cat([variant.bank(mixes[:, row : row + 1], bank) for row in range(70)], 1)
    for rows in range(1, 71):
        assert torch.equal(variant.bank(mixes[:, :rows], bank), singles[:, :rows])


@pytest.fixture
def tiling(variant: Kernels) -> Kernels:
    if not variant.tiles:
        pytest.skip("no tiles here")
    return variant


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 600), width=st.integers(1, 3), size=st.integers(1, 3), kind=st.sampled_from([F.gelu, F.silu])
)
def test_products_of_weights_in_tiles(tiling: Kernels, rows: int, width: int, size: int, kind: Activation) -> None:
    """As without, for any number of rows; a row's bits depend on it alone."""
    width, size = 32 * width, 32 * size
    bank, lin1, lin2 = _bank(2, width, size, torch.bfloat16)
    bank.activation = kind
    projection = Projection(width, size).bfloat16().requires_grad_(False)
    projection.initialize(1)
    wide = projection.weight.float()
    bank.put_in_tiles(), projection.put_in_tiles()
    mixes = random_of(2, rows, width).bfloat16().float()
    found, out = tiling.bank(mixes, bank), tiling.linear(mixes[0], projection.weight, projection.bias, in_tiles=True)
    plain = torch.bmm(kind(torch.bmm(mixes, lin1)), lin2)
    torch.testing.assert_close(found, plain, atol=1e-2 * float(plain.abs().max()), rtol=1e-2)
    torch.testing.assert_close(out, mixes[0] @ wide + projection.bias, atol=1e-4, rtol=1e-4)
    gates = torch.tensor([[1.0, 0.0], [0.5, 2.0]]).repeat(rows, 1)[:rows]
    routed = tiling.routed(mixes[0], gates, bank)
    answers = tiling.bank(mixes[:1].expand(2, rows, width), bank)
    torch.testing.assert_close(routed, torch.einsum("ne,end->nd", gates, answers))
    for row in {0, rows // 2, rows - 1}:
        alone = mixes[:, row : row + 1]
        assert torch.equal(tiling.bank(alone, bank)[:, 0], found[:, row])
        assert torch.equal(tiling.linear(alone[0], projection.weight, projection.bias, in_tiles=True)[0], out[row])
        assert torch.equal(tiling.routed(alone[0], gates[row : row + 1], bank)[0], routed[row])


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 600), width=st.integers(1, 3), size=st.integers(1, 200), scale=st.sampled_from([1e-3, 1.0, 1e3])
)
def test_products_of_int8_in_tiles_are_those_in_pairs(
    tiling: Kernels, rows: int, width: int, size: int, scale: float
) -> None:
    """Bit for bit, whatever hidden units are filled up with; so is what is routed, and a row alone."""
    bank, _, _ = _bank(2, 64 * width, size, torch.int8)
    bank.controller.data = bank.controller.bfloat16()
    mixes = random_of(2, rows, 64 * width, scale=scale)
    gates = torch.tensor([[1.0, 0.0], [0.5, 2.0]]).repeat(rows, 1)[:rows]
    before = tiling.bank(mixes, bank), tiling.routed(mixes[0], gates, bank)
    bank.put_in_tiles()
    assert bank.in_tiles is (2 * (-size % 64) <= size)
    found = tiling.bank(mixes, bank)
    assert torch.equal(found, before[0])
    assert torch.equal(tiling.routed(mixes[0], gates, bank), before[1])
    assert torch.equal(tiling.bank(mixes[:, -1:], bank), found[:, -1:])


def test_what_is_arranged(variant: Kernels) -> None:
    """Bfloat16 weights that fit, where the processor has tiles; then these kernels are always the way."""
    config = ModelConfig(
        vocab_size=8, n_positions=6, n_embd=64, n_layer=2, n_head=1, group_size=2, n_expert=3, expert_size=40
    )
    model = Transformer(config).bfloat16()
    model.initialize(0)
    plain = copy.deepcopy(model)
    variant.arrange(model)
    block, bank = model.blocks[1], model.banks[1]
    assert block.attn.c_attn.in_tiles is block.attn.c_proj.in_tiles is variant.tiles
    assert not bank.in_tiles and torch.equal(bank.lin1, plain.banks[1].lin1), "40 is no multiple of 32"
    x = random_of(5, 64)
    with torch.inference_mode():
        arithmetic = NativeArithmetic(variant)
        found = arithmetic.affine(x, block.attn.c_attn)
        torch.testing.assert_close(found, arithmetic.affine(x, plain.blocks[1].attn.c_attn), atol=1e-5, rtol=1e-5)


def test_numbers_that_are_none_stay_none(variant: Kernels) -> None:
    for dtype in (*DTYPES, torch.int8):
        bank, _, _ = _bank(1, 40, 20, dtype)
        mixes = random_of(1, 3, 40)
        mixes[0, 1, 7] = float("nan")
        answers = variant.bank(mixes, bank)[0]
        assert answers[1].isnan().all() and answers[[0, 2]].isfinite().all()
    for dtype in (torch.bfloat16, torch.int8) if variant.tiles else ():
        bank, _, _ = _bank(1, 64, 64, dtype)
        bank.controller.data = bank.controller.bfloat16()
        bank.put_in_tiles()
        assert bank.in_tiles
        mixes = random_of(1, 3, 64)
        mixes[0, 1, 7] = float("nan")
        answers = variant.bank(mixes, bank)[0]
        assert answers[1].isnan().all() and answers[[0, 2]].isfinite().all()


@pytest.mark.parametrize("quantized", [False, True])
def test_part_of_a_bank(quantized: bool) -> None:
    config = ModelConfig(
        vocab_size=8, n_positions=6, n_embd=8, n_layer=1, n_head=1, group_size=2, n_expert=5, expert_size=3
    )
    bank = ExpertBank(config).requires_grad_(False)
    bank.initialize(1, 1)
    if quantized:
        bank.quantize()
    mixes = random_of(5, 2, 8)
    part = bank.part(3)
    assert part.lin1.data_ptr() == bank.lin1.data_ptr(), "no copy"
    assert part.controller.shape == (8, 3)
    torch.testing.assert_close(part.experts(mixes[:3]), bank.experts(mixes)[:3])


def test_measured_preference(kernels: Kernels) -> None:
    """What was measured is what is preferred; bfloat16 and int8 need no measuring where torch is slow at them."""
    config = ModelConfig(
        vocab_size=8, n_positions=6, n_embd=64, n_layer=1, n_head=1, group_size=2, n_expert=32, expert_size=32
    )
    bank = ExpertBank(config).requires_grad_(False)
    bank.initialize(1, 1)
    most = kernels.measure(bank)
    assert kernels.prefers(most, bank) and not kernels.prefers(most + 1, bank)
    bank.quantize()
    assert kernels.measure(bank) == most and kernels.prefers(1000, bank)


def test_measured_rows(kernels: Kernels) -> None:
    most = kernels.measure_rows(random_of(64, 96), torch.zeros(96))
    assert kernels.prefers_rows(most, torch.zeros(1)) and not kernels.prefers_rows(most + 1, torch.zeros(1))


@settings(deadline=None, max_examples=40)
@given(public=st.integers(0, 9), private=st.integers(0, 9), few=st.integers(0, 9), dtype=dtypes)
def test_public_rows_may_be_multiplied_together(
    kernels: Kernels, public: int, private: int, few: int, dtype: torch.dtype
) -> None:
    """By torch, where they are more than the kernels are faster with; private rows keep their bits."""
    projection = Projection(24, 33).to(dtype).requires_grad_(False)
    torch.manual_seed(0)
    projection.initialize(1)
    head = random_of(41, 24, seed=1).to(dtype)
    x = random_of(public + private, 24, seed=2).to(dtype)
    chosen = copy.copy(kernels)
    chosen._few_rows, chosen._fast_bfloat16 = few, True
    split, alone = NativeArithmetic(chosen, shared=public), NativeArithmetic(kernels)
    for found, one in (
        (split.affine(x, projection), alone.affine(x, projection)),
        (split.head(x, head), alone.head(x, head)),
    ):
        assert found.dtype is one.dtype and torch.equal(found[public:], one[public:])
        torch.testing.assert_close(
            found[:public], one[:public], atol=0.3 if dtype is torch.bfloat16 else 1e-4, rtol=0.02
        )


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 80), width=st.integers(1, 600), dtype=dtypes, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_normalize(variant: Kernels, rows: int, width: int, dtype: torch.dtype, scale: float) -> None:
    norm = nn.LayerNorm(width).requires_grad_(False)
    norm.weight.copy_(random_of(width)), norm.bias.copy_(random_of(width, seed=1))
    norm.to(dtype)
    x = random_of(rows, width, seed=2) * scale + scale
    found = variant.normalize(x, norm)
    torch.testing.assert_close(found, norm.float()(x), atol=1e-4, rtol=1e-4)
    norm.to(dtype)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(variant.normalize(x[row : row + 1], norm)[0], found[row])


@settings(deadline=None)
@given(st.lists(st.floats(-120, 120, width=32), min_size=1, max_size=40))
def test_activations(variant: Kernels, numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    for activation in (_gelu_tanh, F.gelu, F.silu, F.relu):
        found = variant.activate(x.clone(), activation)
        torch.testing.assert_close(found, activation(x), atol=2e-6, rtol=2e-6)
        many = x.repeat(-(-70000 // len(x)))  # for several threads
        assert torch.equal(variant.activate(many.clone(), activation).view(-1, len(x))[[0, -1]], found.expand(2, -1))
        for place in range(len(x)):  # of its place a number knows nothing
            assert torch.equal(variant.activate(x[place : place + 1].clone(), activation)[0], found[place])


def test_unknown_activation_is_named() -> None:
    with pytest.raises(NativeUnavailable, match="activation"):
        activation_kind(torch.tanh)
