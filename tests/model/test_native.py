"""The compiled kernels against their plain twins, and their promise: a row's bits depend on that row alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.groups import Fill, PrivateRows, SharedGroups
from model.layers import Projection
from model.mixing import ExpertBank, _gelu_tanh
from model.native import Kernels, NativeArithmetic, NativeUnavailable, activation_kind, build, open_kernels
from model.reference import ReferenceCrowd
from model.token_choice import TokenChoice
from tests.model.kinds import KINDS, make

DTYPES = [torch.float32, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
types = st.sampled_from([*DTYPES, torch.int8])


# What other processors get, as far as this one can run it.
VARIANTS = {
    "native": (),
    "no pairs": ("-mno-avx512bf16", "-mno-avx512vnni"),
    "avx2": ("-march=x86-64-v3",),
    "portable": ("-march=x86-64",),
}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return _opened()


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> Kernels:
    return _opened(*VARIANTS[request.param])


def _opened(*flags: str) -> Kernels:
    try:
        return open_kernels(*flags)
    except NativeUnavailable as error:
        pytest.skip(str(error))


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70), inner=st.integers(1, 300), outer=st.integers(1, 330), by_output=st.booleans(),
    exact=st.booleans(), dtype=dtypes,
)  # fmt: skip
def test_linear(
    variant: Kernels, rows: int, inner: int, outer: int, by_output: bool, exact: bool, dtype: torch.dtype
) -> None:
    x, bias = _random(rows, inner), _random(outer, seed=1)
    if not exact:
        x = x.to(dtype).float()  # products in bfloat16 round what they are given
    weight = _random(*((outer, inner) if by_output else (inner, outer)), seed=2).to(dtype)
    found = variant.linear(x, weight, bias, by_output=by_output, exact=exact)
    plain = torch.addmm(bias, x, weight.float().t() if by_output else weight.float())
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    for row in {0, rows // 2, rows - 1}:
        alone = variant.linear(x[row : row + 1], weight, bias, by_output=by_output, exact=exact)
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "outer"), [(96, 192), (131, 75)])
def test_a_row_is_the_same_among_any_number(
    variant: Kernels, dtype: torch.dtype, by_output: bool, inner: int, outer: int
) -> None:
    x = _random(70, inner)
    weight = _random(*((outer, inner) if by_output else (inner, outer)), seed=2).to(dtype)
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
    mixes = _random(experts, rows, width)
    bank, lin1, lin2 = _bank(experts, width, size, dtype)
    loose = 1e-3
    if dtype is torch.bfloat16:
        mixes, loose = mixes.bfloat16().float(), 1e-2  # what is hidden is rounded too
    for activation in (F.gelu, F.relu, F.silu):
        bank.activation = activation
        found = variant.bank(mixes, bank)
        plain = torch.bmm(activation(torch.bmm(mixes, lin1)), lin2)
        torch.testing.assert_close(found, plain, atol=loose * float(plain.abs().max()), rtol=loose)
        if dtype is not torch.bfloat16:
            torch.testing.assert_close(bank.experts(mixes), plain, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize(("width", "size"), [(64, 96), (45, 131)])
def test_a_mix_is_answered_alike_among_any_number(variant: Kernels, dtype: torch.dtype, width: int, size: int) -> None:
    bank, _, _ = _bank(2, width, size, dtype)
    mixes = _random(2, 70, width)
    singles = torch.cat([variant.bank(mixes[:, row : row + 1], bank) for row in range(70)], 1)
    for rows in range(1, 71):
        assert torch.equal(variant.bank(mixes[:, :rows], bank), singles[:, :rows])


def test_numbers_that_are_none_stay_none(variant: Kernels) -> None:
    for dtype in (*DTYPES, torch.int8):
        bank, _, _ = _bank(1, 40, 20, dtype)
        mixes = _random(1, 3, 40)
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
    mixes = _random(5, 2, 8)
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


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 9), heads=st.integers(1, 4), size=st.integers(1, 40), dtype=dtypes, data=st.data())
def test_attend(variant: Kernels, rows: int, heads: int, size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    blocks, block_size, width = 12, 4, 6
    lengths = data.draw(st.lists(st.integers(1, width * block_size), min_size=rows, max_size=rows))
    keys, values = (_random(blocks, block_size, heads, size, seed=s).to(dtype) for s in (1, 2))
    tables = torch.randint(blocks, (rows, width), generator=torch.Generator().manual_seed(3))
    queries = _random(rows, heads, size)
    found = variant.attend(queries, keys, values, tables, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        mine = [t[tables[row]].flatten(0, 1)[:length].float().transpose(0, 1) for t in (keys, values)]
        plain = F.scaled_dot_product_attention(queries[row][:, None], *mine)[:, 0]
        torch.testing.assert_close(found[row], plain, atol=1e-4, rtol=1e-4)
        # A wider table and other rows change nothing.
        wider = torch.cat((tables[row : row + 1], torch.zeros(1, 3, dtype=torch.int64)), 1)
        alone = variant.attend(queries[row : row + 1], keys, values, wider, torch.tensor([length]))
        assert torch.equal(alone[0], found[row])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 12),
    group=st.integers(1, 5),
    rivals=st.integers(1, 4),
    fill=st.sampled_from(["reference", "zeros", "none"]),
    over_experts=st.booleans(),
    discrete=st.booleans(),
    dtype=types,
    seed=st.integers(0, 1000),
)
def test_private_layer(
    variant: Kernels,
    rows: int,
    group: int,
    rivals: int,
    fill: str,
    over_experts: bool,
    discrete: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    config = ModelConfig(
        vocab_size=8, n_positions=6, n_embd=18, n_layer=1, n_head=2, group_size=group, n_expert=7, expert_size=11,
        emit_softmax_over_experts=over_experts, use_discrete_routing=discrete,
    )  # fmt: skip
    bank = ExpertBank(config)
    torch.manual_seed(seed)
    bank.initialize(0.5, 0.5)
    # Values that bfloat16 holds exactly, in a bank that computes in float32: the twins differ by rounding alone.
    bank.requires_grad_(False)
    native = copy.deepcopy(bank)
    if dtype is torch.int8:
        native.quantize()
        bank.quantize()
        dtype = torch.float32
    else:
        native.to(dtype)
        bank.to(dtype).float()
    activations = _random(1, 6, group, 18, seed=seed + 1).to(dtype)
    crowd = ReferenceCrowd(activations.float(), [bank], fingerprint=None, rivals=min(rivals, group - 1))
    chosen = Fill.build(fill, config, [bank], crowd)  # type: ignore[arg-type]
    about = {
        "positions": torch.arange(rows) % 6,
        "temperatures": torch.tensor([[1.0, 0.3, 0.0][row % 3] for row in range(rows)]),
        "skip_below": torch.tensor([[0.0, 0.05][row % 2] for row in range(rows)]),
        "live": torch.tensor([row % 5 != 4 for row in range(rows)]),
    }
    x = _random(rows, 18, seed=seed + 2)
    plain = PrivateRows(config, chosen, **about)
    wanted = plain(0, bank, x)
    entropy, used = torch.zeros(rows), torch.zeros(rows, dtype=torch.int64)
    layer = None if chosen.crowd is None else (chosen.crowd.places[0].to(dtype), chosen.crowd.scores[0])

    groups = _random(bank.lin1.shape[0], seed % 3, 18, seed=seed + 3)

    def run(only: slice) -> Tensor:
        entropy.zero_()
        used.zero_()
        out, outputs = variant.private_layer(
            x[only], native, layer, **{name: value[only].contiguous() for name, value in about.items()},
            rivals=0 if chosen.crowd is None else chosen.crowd.rivals, entropy=entropy, used=used, mixes=groups,
        )  # fmt: skip
        assert torch.equal(outputs, variant.bank(groups, native))
        return out

    singles = [run(slice(row, row + 1)) for row in range(rows)]
    found = run(slice(0, rows))
    assert torch.equal(torch.cat(singles), found)
    loose = 2e-2 if dtype is torch.bfloat16 else 1e-3  # where products round what they are given
    torch.testing.assert_close(found, wanted, atol=loose * max(1.0, float(wanted.abs().max())), rtol=loose)
    assert used.tolist() == plain.experts_used.tolist()
    live = about["live"]
    torch.testing.assert_close(entropy[live], plain.entropy[live], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fill", ["reference", "none"])
@pytest.mark.parametrize("beside", [0, 2])
def test_full_groups_in_order_need_no_gathering(kernels: Kernels, fill: str, beside: int) -> None:
    """As by gathering them in another order, and as plain ones; rows in no group get zeros."""
    config = ModelConfig(
        vocab_size=8, n_positions=6, n_embd=18, n_layer=1, n_head=2, group_size=4, n_expert=7, expert_size=11
    )
    bank = ExpertBank(config).requires_grad_(False)
    torch.manual_seed(0)
    bank.initialize(0.5, 0.5)
    crowd = ReferenceCrowd(_random(1, 6, 4, 18, seed=1), [bank], fingerprint=None)
    x, order, swapped = _random(8 + beside, 18, seed=2), torch.arange(8), torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])

    def run(rows: Tensor, positions: Tensor, chosen: Kernels | None) -> tuple[Tensor, Tensor]:
        groups = SharedGroups(
            config, Fill.build(fill, config, [bank], crowd), rows=rows, places=order,  # type: ignore[arg-type]
            positions=positions, largest=4, kernels=chosen,
        )  # fmt: skip
        return groups(0, bank, x), groups.entropy

    found, entropy = run(order, torch.tensor([3, 1]), kernels)
    for wanted, theirs in (
        run(order, torch.tensor([3, 1]), None), (run(swapped, torch.tensor([1, 3]), kernels)[0], entropy)
    ):  # fmt: skip
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(entropy, theirs, atol=1e-4, rtol=1e-4)
    assert not found[8:].any() and found[:8].any()


def _shares(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities in order of weight, best first, and their ids, in float64, by the definition."""
    weights = torch.softmax(logits.double() / temperature, 0)
    order = torch.argsort(logits, descending=True, stable=True)
    kept = weights[order]
    if top_k:
        kept[top_k:] = 0
    kept = torch.where(kept >= min_p * kept[0], kept, 0)
    before = (kept.cumsum(0) - kept) / kept.sum()
    if top_p < 1:
        kept = torch.where((before < top_p) | (torch.arange(len(kept)) == 0), kept, 0)
    return order, kept / kept.sum()


@settings(deadline=None, max_examples=300)
@given(
    size=st.integers(1, 300),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    temperature=st.sampled_from([0.01, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_draw(
    kernels: Kernels, size: int, seed: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float,
    uniform: float,
) -> None:  # fmt: skip
    logits = _random(1, size, seed=seed, scale=scale)

    def draw(rows: Tensor, temperature: float = temperature) -> list[int]:
        columns = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
        filled = {name: torch.full((len(rows),), value) for name, value in columns.items()}
        return kernels.draw(
            rows, **filled, top_k=torch.full((len(rows),), top_k),
            uniform=torch.full((len(rows),), uniform, dtype=torch.float64),
        ).tolist()  # fmt: skip

    (token,) = draw(logits)
    order, shares = _shares(logits[0], temperature, top_k, top_p, min_p)
    # The drawn token's stretch of the cumulative distribution, in order of id, holds the number, but for rounding: of
    # weights, and of the cut of top_p, which may fall on either side of the last token.
    by_id = torch.zeros_like(shares).scatter_(0, order, shares)
    last = shares[shares > 0][-1] if top_p < 1 else 0.0
    loose = 2e-5 + 1.1 * float(last)
    upto = float(by_id[: token + 1].sum())
    assert upto - float(by_id[token]) - loose <= uniform <= upto + loose
    assert by_id[token] > 0 or top_p < 1
    assert draw(torch.cat((_random(3, size, seed=seed + 1), logits)))[3] == token
    assert draw(logits, temperature=0.0) == [int((logits[0] == logits[0].max()).nonzero()[0])]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 90),
    best=st.integers(0, 20),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_score(kernels: Kernels, rows: int, size: int, best: int, whole: bool, seed: int) -> None:
    logits = _random(rows, size, seed=seed, scale=4.0)
    logits = logits.round() if whole else logits  # with ties
    tokens = torch.arange(rows) % size
    best = min(best, size)
    chosen, ids, values = kernels.score(logits, tokens, best)
    plain = torch.log_softmax(logits, 1)
    torch.testing.assert_close(chosen, plain.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    expected = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :best]
    assert torch.equal(ids, expected)
    torch.testing.assert_close(values, plain.gather(1, expected), atol=1e-5, rtol=1e-5)
    for row in range(rows):
        alone = kernels.score(logits[row : row + 1], tokens[row : row + 1], best)
        assert torch.equal(alone[0][0], chosen[row]) and torch.equal(alone[2][0], values[row])


@settings(deadline=None)
@given(st.lists(st.floats(-120, 120, width=32), min_size=1, max_size=40))
def test_activations(variant: Kernels, numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    for activation in (_gelu_tanh, F.gelu, F.silu, F.relu):
        found = variant.activate(x.clone(), activation)
        torch.testing.assert_close(found, activation(x), atol=2e-6, rtol=2e-6)
        for place in range(len(x)):  # of its place a number knows nothing
            assert torch.equal(variant.activate(x[place : place + 1].clone(), activation)[0], found[place])


@settings(deadline=None, max_examples=40)
@given(public=st.integers(0, 9), private=st.integers(0, 9), few=st.integers(0, 9), dtype=dtypes)
def test_public_rows_may_be_multiplied_together(
    kernels: Kernels, public: int, private: int, few: int, dtype: torch.dtype
) -> None:
    """By torch, where they are more than the kernels are faster with; private rows keep their bits."""
    projection = Projection(24, 33).to(dtype).requires_grad_(False)
    torch.manual_seed(0)
    projection.initialize(1)
    head = _random(41, 24, seed=1).to(dtype)
    x = _random(public + private, 24, seed=2).to(dtype)
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


def test_measured_rows(kernels: Kernels) -> None:
    most = kernels.measure_rows(_random(64, 96), torch.zeros(96))
    assert kernels.prefers_rows(most, torch.zeros(1)) and not kernels.prefers_rows(most + 1, torch.zeros(1))


def test_unknown_activation_is_named() -> None:
    with pytest.raises(NativeUnavailable, match="activation"):
        activation_kind(torch.tanh)


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NativeUnavailable, match="compiler"):
        build()


def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NativeUnavailable, match="no such flag"):
        build()
    assert not list((tmp_path / "motserve").iterdir())


@pytest.mark.parametrize("name", ["switch", "top-k"])
@pytest.mark.parametrize("quantized", [False, True])
def test_token_choice_three_ways(kernels: Kernels, name: str, quantized: bool) -> None:
    """Compiled, tiled and expert by expert; a row's bits are its own in the first two."""
    bank = make(KINDS[name]).banks[0]
    if quantized:
        bank.quantize()
    x = _random(11, 24)
    compiled, tiled, plain = (mix(0, bank, x) for mix in (TokenChoice(kernels), TokenChoice(tiled=True), TokenChoice()))
    torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(tiled, plain, atol=1e-3, rtol=1e-3)
    for row in range(11):
        assert torch.equal(TokenChoice(kernels)(0, bank, x[row : row + 1])[0], compiled[row])
