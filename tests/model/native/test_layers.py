"""Compiled attention and feed-forward layers against their plain twins; a private row's bits are its own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.groups import Fill, PrivateRows, SharedGroups
from model.mixing import ExpertBank, mixing_entropy, mixing_weights
from model.native import Kernels
from model.reference import ReferenceCrowd
from model.token_choice import TokenChoice, chosen_experts, gates_of
from tests.model.kinds import KINDS, make
from tests.model.native.inputs import DTYPES, dtypes, random_of, types

# Heads of whole vectors go a way of their own, and so do vectors of places.
head_sizes = st.sampled_from((16, 32, 64, 128)) | st.integers(1, 40)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 4), head_sizes, st.sampled_from((4, 16, 24)), dtypes, st.data())
def test_attend(
    variant: Kernels, rows: int, heads: int, size: int, block_size: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    blocks, width = 12, 6
    lengths = data.draw(st.lists(st.integers(1, width * block_size), min_size=rows, max_size=rows))
    keys, values = (random_of(blocks, block_size, heads, size, seed=s).to(dtype) for s in (1, 2))
    tables = torch.randint(blocks, (rows, width), generator=torch.Generator().manual_seed(3))
    queries = random_of(rows, heads, size)
    found = variant.attend(queries, keys, values, tables, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        mine = [t[tables[row]].flatten(0, 1)[:length].float().transpose(0, 1) for t in (keys, values)]
        plain = F.scaled_dot_product_attention(queries[row][:, None], *mine)[:, 0]
        torch.testing.assert_close(found[row], plain, atol=1e-4, rtol=1e-4)
        # A wider table and other rows change nothing.
        wider = torch.cat((tables[row : row + 1], torch.zeros(1, 3, dtype=torch.int64)), 1)
        alone = variant.attend(queries[row : row + 1], keys, values, wider, torch.tensor([length]))
        assert torch.equal(alone[0], found[row])
    apart = torch.cat((queries, queries, queries), 1)[:, :heads]
    assert torch.equal(variant.attend(apart, keys, values, tables, torch.tensor(lengths)), found)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 40), heads=st.integers(1, 3), size=st.integers(1, 40), dtype=dtypes)
def test_keep(variant: Kernels, rows: int, heads: int, size: int, dtype: torch.dtype) -> None:
    """As torch rounds, special numbers too; what has no slot stays as it is."""
    keys, values = (random_of(11, 4, heads, size, seed=seed).to(dtype) for seed in (1, 2))
    qkv = random_of(rows, 3 * heads * size, seed=3)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 1.00390625, 1.01171875, 3.4e38])
    qkv.view(-1)[: len(special)] = special[: qkv.numel()]
    slots = torch.randperm(44, generator=torch.Generator().manual_seed(4))[:rows]
    wanted = [side.clone() for side in (keys, values)]
    for side, given_ in zip(wanted, qkv.view(rows, 3, heads, size).unbind(1)[1:], strict=True):
        side.flatten(0, 1)[slots] = given_.to(dtype)
    variant.keep(qkv, slots, keys, values)
    for found, plain in zip((keys, values), wanted, strict=True):
        assert torch.equal(found.nan_to_num(7), plain.nan_to_num(7)) and torch.equal(found.isnan(), plain.isnan())


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 12),
    group=st.integers(1, 5),
    rivals=st.integers(1, 4),
    fill=st.sampled_from(["reference", "zeros", "none"]),
    over_experts=st.booleans(),
    discrete=st.booleans(),
    dtype=types,
    sizes=st.sampled_from([(18, 11), (64, 32), (64, 50)]),
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
    sizes: tuple[int, int],
    seed: int,
) -> None:
    width, size = sizes
    config = ModelConfig(
        vocab_size=8, n_positions=6, n_embd=width, n_layer=1, n_head=2, group_size=group, n_expert=7, expert_size=size,
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
        dtype = DTYPES[seed % 2]
        native.controller.data = native.controller.to(dtype)
        bank.controller.data = native.controller.float()
    else:
        native.to(dtype)
        bank.to(dtype).float()
    variant.arrange(native)
    activations = random_of(1, 6, group, width, seed=seed + 1).to(dtype)
    crowd = ReferenceCrowd(activations.float(), [bank], fingerprint=None, rivals=min(rivals, group - 1))
    chosen = Fill.build(fill, config, [bank], crowd)  # type: ignore[arg-type]
    about = {
        "positions": torch.arange(rows) % 6,
        "temperatures": torch.tensor([[1.0, 0.3, 0.0][row % 3] for row in range(rows)]),
        "skip_below": torch.tensor([[0.0, 0.05][row % 2] for row in range(rows)]),
        "live": torch.tensor([row % 5 != 4 for row in range(rows)]),
    }
    x = random_of(rows, width, seed=seed + 2)
    plain = PrivateRows(config, chosen, **about)
    wanted = plain(0, bank, x)
    entropy, used = torch.zeros(rows), torch.zeros(rows, dtype=torch.int64)
    layer = None if chosen.crowd is None else (chosen.crowd.places[0].to(dtype), chosen.crowd.scores[0])

    groups = random_of(bank.lin1.shape[0], seed % 3, width, seed=seed + 3)

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


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 5), size=st.integers(1, 9), experts=st.integers(1, 70), seed=st.integers(0, 100),
    temperature=st.sampled_from([1e-3, 0.1, 1.0, 7.0]), empty=st.booleans(),
)  # fmt: skip
def test_mix_weights(
    variant: Kernels, groups: int, size: int, experts: int, temperature: float, empty: bool, seed: int
) -> None:
    scores = random_of(groups, size, experts, seed=seed)
    if empty:
        scores[0, 1:] = float("-inf")  # places that nobody takes
    wanted, _ = mixing_weights(scores, temperature, over_experts=False, discrete=False)
    entropy = torch.ones(groups)
    found = variant.mix_weights(scores, temperature, entropy)
    assert found is scores
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)  # at 1e-3 scores count a thousandfold
    torch.testing.assert_close(entropy - 1, mixing_entropy(wanted), atol=1e-4, rtol=1e-4)


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
    crowd = ReferenceCrowd(random_of(1, 6, 4, 18, seed=1), [bank], fingerprint=None)
    x, order, swapped = random_of(8 + beside, 18, seed=2), torch.arange(8), torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])

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


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9), experts=st.integers(1, 70), shared=st.integers(0, 2), normalize=st.booleans(),
    level=st.sampled_from([0.3, 1.0, 1e30]), data=st.data(),
)  # fmt: skip
def test_gates(
    variant: Kernels, rows: int, experts: int, shared: int, normalize: bool, level: float, data: st.DataObject
) -> None:
    """As torch's, ties included: scores are of few different values."""
    per_token = data.draw(st.integers(1, experts))
    config = KINDS["top-k"].replace(
        n_expert=experts,
        n_shared_expert=shared,
        experts_per_token=per_token,
        normalize_gates=normalize and per_token > 1,
    )
    bank = ExpertBank(config).requires_grad_(False)
    scores = random_of(rows, experts, seed=experts).mul(2).round().mul(level)
    wanted = gates_of(bank, torch.softmax(scores, 1), chosen_experts(scores, per_token))
    found = variant.gates(scores, bank)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(variant.gates(scores[-1:].contiguous(), bank), found[-1:])
    scores[0, 0] = float("nan")
    broken = variant.gates(scores, bank)
    assert not (broken[0, :experts] > 0).any() and torch.equal(broken[1:], found[1:])


@pytest.mark.parametrize("name", ["switch", "top-k"])
@pytest.mark.parametrize("quantized", [False, True])
def test_token_choice_three_ways(kernels: Kernels, name: str, quantized: bool) -> None:
    """Compiled, tiled and expert by expert; a row's bits are its own in the first two."""
    bank = make(KINDS[name]).banks[0]
    if quantized:
        bank.quantize()
    x = random_of(11, 24)
    compiled, tiled, plain = (mix(0, bank, x) for mix in (TokenChoice(kernels), TokenChoice(tiled=True), TokenChoice()))
    torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(tiled, plain, atol=1e-3, rtol=1e-3)
    for row in range(11):
        assert torch.equal(TokenChoice(kernels)(0, bank, x[row : row + 1])[0], compiled[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_private_rows_are_as_few(kernels: Kernels, dtype: torch.dtype) -> None:
    """More than are computed at once, beside shared groups, which are computed once."""
    config = ModelConfig(
        vocab_size=8, n_positions=6, n_embd=64, n_layer=1, n_head=2, group_size=4, n_expert=5, expert_size=32
    )
    bank = ExpertBank(config).requires_grad_(False)
    torch.manual_seed(0)
    bank.initialize(0.5, 0.5)
    bank.to(dtype)
    kernels.arrange(bank)
    crowd = ReferenceCrowd(random_of(1, 6, 4, 64, seed=1), [bank], fingerprint=None)
    x, groups = random_of(300, 64, seed=2), random_of(5, 3, 64, seed=3)
    temperatures = torch.tensor([1.0, 0.2, 0.0]).repeat(100)

    def run(rows: slice, mixes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        some = x[rows]
        count = some.shape[0]
        entropy, used = torch.zeros(count), torch.zeros(count, dtype=torch.int64)
        out, outputs = kernels.private_layer(
            some, bank, (crowd.places[0].to(dtype), crowd.scores[0]), rivals=crowd.rivals,
            positions=(torch.arange(300) % 6)[rows].contiguous(), temperatures=temperatures[rows].contiguous(),
            skip_below=torch.full((count,), 0.05), live=torch.ones(count, dtype=torch.bool), entropy=entropy, used=used,
            mixes=mixes,
        )  # fmt: skip
        return out, outputs, entropy, used

    out, outputs, entropy, used = run(slice(0, 300), groups)
    assert torch.equal(outputs, kernels.bank(groups, bank))
    for first in (0, 100, 127, 128, 290):
        alone = run(slice(first, first + 9), groups[:, :0])
        for whole, part in zip((out, entropy, used), (alone[0], *alone[2:]), strict=True):
            assert torch.equal(whole[first : first + 9], part)
