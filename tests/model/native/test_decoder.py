"""A pass in one call against its parts, one after the other: private rows to the bit, public ones up to rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.groups import Fill, PrivateRows, SharedGroups
from model.kv_cache import PagedAttention, PagedKVCache, SingleRows
from model.mixing import ExpertBank
from model.native import Kernels
from model.native.arithmetic import NativeArithmetic
from model.native.decoder import Company, NativeDecoder
from model.reference import ReferenceCrowd
from model.token_choice import TokenChoice
from model.transformer import Transformer
from tests.model.kinds import KINDS, MOT, TOKEN_CHOICE, make
from tests.model.native.inputs import DTYPES, random_of

BLOCK, WIDTH, BLOCKS = 4, 6, 640
ROW_BY_ROW = ("dense", *TOKEN_CHOICE)
SMALL = {"mot": MOT, **{name: KINDS[name] for name in ROW_BY_ROW}}
# Sizes that go into tiles.
WHOLE = {
    **{name: KINDS[name].replace(n_embd=64, expert_size=64) for name in TOKEN_CHOICE},
    "dense": KINDS["dense"].replace(n_embd=64, n_inner=96),
    "mot": MOT.replace(n_embd=64, expert_size=64, temperature=0.5, activation_function="gelu_new"),
}


class Machine:
    """A model with a filled cache, and both ways through it."""

    def __init__(
        self, kernels: Kernels, config: ModelConfig, dtype: torch.dtype, fill: str, *, quantize: bool = False
    ) -> None:
        model = make(config, 2.0)
        crowd = None
        if config.is_mot:
            activations = random_of(config.n_layer, config.n_positions, config.group_size, config.n_embd, seed=5)
            crowd = ReferenceCrowd(activations.to(dtype), model.banks, fingerprint=None, rivals=2)
        for bank in model.banks:
            if quantize:
                bank.quantize()
        for parameter in model.parameters():
            if parameter.dtype is torch.float32:
                parameter.data = parameter.data.to(dtype)
        kernels.arrange(model)
        self.kernels, self.model, self.config = kernels, model, config
        self.fill = Fill.build(fill, config, model.banks, crowd)  # type: ignore[arg-type]
        self.caches = [self._cache(dtype) for _ in range(2)]
        self.decoder = NativeDecoder(model, self.fill, self.caches[0], kernels)

    def _cache(self, dtype: torch.dtype) -> PagedKVCache:
        cache = PagedKVCache(self.config, blocks=BLOCKS, block_size=BLOCK, dtype=dtype, device=torch.device("cpu"))
        for layer in range(self.config.n_layer):
            for side, seed in zip(cache.layer(layer), (1, 2), strict=True):
                side.copy_(random_of(*side.shape, seed=seed + 2 * layer))
        return cache

    def whole(self, rows: Rows, company: Company) -> Tensor:
        return self.decoder(rows.ids, rows.positions, rows.slots, rows.single, company)

    def by_parts(self, rows: Rows, shared: SharedGroups | None, private: PrivateRows | None, public: int) -> Tensor:
        def mix(layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
            if self.config.is_token_choice:
                return TokenChoice(self.kernels)(layer, bank, x)
            parts = [each(layer, bank, part) for each, part in ((shared, x[:public]), (private, x[public:])) if each]
            return torch.cat(parts)

        attention = PagedAttention(self.caches[1], self.config, rows.slots, [], rows.single, self.kernels)
        arithmetic = NativeArithmetic(self.kernels, shared=0)
        found: Tensor = self.model(rows.ids, rows.positions, attention, mix, arithmetic)
        return found


class Rows:
    """Of as many sequences, each with blocks of its own."""

    def __init__(self, count: int, config: ModelConfig, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(config.vocab_size, (count,), generator=generator)
        self.positions = torch.randint(BLOCK * WIDTH, (count,), generator=generator)
        tables = 1 + torch.arange(count * WIDTH).view(count, WIDTH)
        self.slots = tables[torch.arange(count), self.positions // BLOCK] * BLOCK + self.positions % BLOCK
        self.single = SingleRows(torch.arange(count), tables, self.positions + 1)


def company_of(groups: list[list[int]], size: int, rows: Rows, temperatures: list[float]) -> Company:
    members = [[*group, *[-1] * (size - len(group))] for group in groups]
    places = [int(rows.positions[group[0]]) for group in groups]
    skip = torch.full((len(temperatures),), 0.01)
    return Company.of(members, places, torch.tensor(temperatures, dtype=torch.float32), skip)


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.sampled_from([SMALL, WHOLE]),
    lives=st.lists(st.integers(1, 4), max_size=3),
    temperatures=st.lists(st.sampled_from([0.0, 0.2, 0.5]), max_size=4),
    fill=st.sampled_from(["reference", "zeros"]),
    dtype=st.sampled_from(DTYPES),
    quantize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_mixtures(
    variant: Kernels,
    sizes: dict[str, ModelConfig],
    lives: list[int],
    temperatures: list[float],
    fill: str,
    dtype: torch.dtype,
    quantize: bool,
    seed: int,
) -> None:
    if not lives and not temperatures:
        lives = [1]
    config, public, private = sizes["mot"], sum(lives), len(temperatures)
    machine = Machine(variant, config, dtype, fill, quantize=quantize)
    rows = Rows(public + private, config, seed)
    groups = [list(range(sum(lives[:n]), sum(lives[: n + 1]))) for n in range(len(lives))]
    company = company_of(groups, config.group_size, rows, temperatures)
    found = machine.whole(rows, company)

    shared = own = None
    if groups:
        places = [n * config.group_size + i for n, group in enumerate(groups) for i in range(len(group))]
        shared = SharedGroups(
            config, machine.fill, rows=torch.arange(public), places=torch.tensor(places), positions=company.places,
            largest=max(lives), kernels=variant,
        )  # fmt: skip
    if private:
        own = PrivateRows(
            config, machine.fill, positions=rows.positions[public:], temperatures=company.temperatures,
            skip_below=company.skip_below, live=torch.ones(private, dtype=torch.bool), kernels=variant,
        )  # fmt: skip
    wanted = machine.by_parts(rows, shared, own, public)
    # Where mixes are rounded, the last bit of one counts.
    loose = 1e-4 if dtype is torch.float32 and not quantize else 5e-2
    torch.testing.assert_close(found[:public], wanted[:public], atol=loose, rtol=loose)
    assert torch.equal(found[public:], wanted[public:])
    if shared is not None:
        torch.testing.assert_close(company.shared_entropy, shared.entropy, atol=loose, rtol=loose)
    if own is not None:
        assert torch.equal(company.private_entropy, own.entropy)
    for keys, others in zip(*(cache.layer(0) for cache in machine.caches), strict=True):
        assert torch.equal(keys, others)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("experts", [5, 16, 33])
@pytest.mark.parametrize("size", [16, 32, 40])
def test_groups_of_many_members(variant: Kernels, size: int, experts: int, quantize: bool) -> None:
    """Where mixes and answers go through tiles, in which not all places are taken."""
    config = WHOLE["mot"].replace(group_size=size, n_expert=experts)
    machine = Machine(variant, config, torch.bfloat16, "reference", quantize=quantize)
    lives = [size, 1, 7] + [2] * 15  # more groups than a tile has rows
    ends = [sum(lives[: n + 1]) for n in range(len(lives))]
    groups = [list(range(end - live, end)) for end, live in zip(ends, lives, strict=True)]
    rows = Rows(ends[-1], config, 0)
    company = company_of(groups, size, rows, [])
    found = machine.whole(rows, company)
    places = torch.tensor([n * size + i for n, live in enumerate(lives) for i in range(live)])
    shared = SharedGroups(
        config, machine.fill, rows=torch.arange(ends[-1]), places=places, positions=company.places, largest=size,
        kernels=variant,
    )  # fmt: skip
    wanted = machine.by_parts(rows, shared, None, ends[-1])
    torch.testing.assert_close(found, wanted, atol=5e-2, rtol=5e-2)
    torch.testing.assert_close(company.shared_entropy, shared.entropy, atol=5e-2, rtol=5e-2)
    some = [group for number, group in enumerate(groups) if number != 1]
    others = machine.whole(rows, company_of(some, size, rows, []))
    inside = [row for group in some for row in group]
    assert torch.equal(others[inside], found[inside]), "groups depend on each other"


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SMALL, WHOLE], ids=["small", "whole"])
@pytest.mark.parametrize("kind", ROW_BY_ROW)
def test_rows_that_never_meet(
    variant: Kernels, kind: str, sizes: dict[str, ModelConfig], dtype: torch.dtype, quantize: bool
) -> None:
    """All of them to the bit, beside however many."""
    machine = Machine(variant, sizes[kind], dtype, "none", quantize=quantize)
    rows = Rows(6, sizes[kind], 3)
    nobody = torch.empty(0)
    found = machine.whole(rows, Company.of([], [], nobody, nobody))
    assert torch.equal(found, machine.by_parts(rows, None, None, 0))
    own = torch.tensor([0.5, 0.0]), torch.zeros(2)
    assert torch.equal(machine.whole(rows, Company.of([], [], *own)), found), "private or not"
    one = Rows(6, sizes[kind], 3)
    for name in ("ids", "positions", "slots"):
        setattr(one, name, getattr(one, name)[2:3])
    one.single = SingleRows(torch.arange(1), one.single.tables[2:3].contiguous(), one.single.lengths[2:3])
    assert torch.equal(machine.whole(one, Company.of([], [], nobody, nobody))[0], found[2])


def test_many_private_rows(kernels: Kernels) -> None:
    """More than are computed at once: each as it is alone."""
    machine = Machine(kernels, MOT, torch.float32, "reference")
    count = 150
    ids, positions = torch.arange(count) % 61, torch.arange(count) % 40
    tables = 1 + torch.arange(count)[:, None]  # each sees itself only
    temperatures = torch.tensor([0.0, 0.3, 1.0]).repeat(50)

    def run(first: int, end: int) -> tuple[Tensor, Tensor]:
        part, rows = slice(first, end), end - first
        company = Company.of([], [], temperatures[part], torch.full((rows,), 0.01))
        single = SingleRows(torch.arange(rows), tables[part], torch.ones(rows, dtype=torch.int64))
        hidden = machine.decoder(ids[part], positions[part], tables[part, 0] * BLOCK, single, company)
        return hidden, company.private_entropy

    together = run(0, count)
    alone = [torch.cat(parts) for parts in zip(*(run(row, row + 1) for row in range(count)), strict=True)]
    for found, wanted in zip(together, alone, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("ids", "positions"), [([61], [0]), ([-1], [0]), ([0], [40]), ([0], [-1])])
def test_unknown_rows_are_refused(kernels: Kernels, ids: list[int], positions: list[int]) -> None:
    machine = Machine(kernels, MOT, torch.float32, "reference")
    rows = Rows(1, MOT, 0)
    rows.ids, rows.positions = torch.tensor(ids), torch.tensor(positions)
    with pytest.raises(IndexError):
        machine.whole(rows, company_of([[0]], 4, Rows(1, MOT, 0), []))


def test_what_goes_part_by_part() -> None:
    assert all(NativeDecoder.knows(Transformer(config)) for config in SMALL.values())
    others = [config for name, config in KINDS.items() if name not in SMALL]
    changes = ({"temperature": 0.0}, {"emit_softmax_over_experts": True}, {"use_discrete_routing": True})
    others += [MOT.replace(**change) for change in changes]
    assert not any(NativeDecoder.knows(Transformer(config)) for config in others)


def test_when_it_is_the_way(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few groups: many, whose members would not stay in a cache, are mixed at once. And completed ones only."""
    monkeypatch.setattr(kernels, "prefers_rows", lambda rows, weight: rows <= 9000)
    monkeypatch.setattr(kernels, "prefers", lambda groups, bank: True)
    config = WHOLE["mot"]
    machine = Machine(kernels, config, torch.float32, "reference")
    assert machine.decoder.prefers(8, 2) and machine.decoder.prefers(0, 0)
    assert not machine.decoder.prefers(8000, 2000)
    assert not machine.decoder.prefers(10000, 2)
    alone = Machine(kernels, config, torch.float32, "none").decoder
    assert alone.prefers(0, 0) and not alone.prefers(8, 2)
    bank = machine.model.banks[0]
    assert kernels.prefers_whole(128, 32, bank) and not kernels.prefers_whole(129, 32, bank)
    bank.in_tiles = True
    assert kernels.prefers_whole(512, 32, bank) and not kernels.prefers_whole(513, 32, bank)
    assert not kernels.prefers_whole(513, 8, bank), "tiles would be half empty"
