"""Compiled sampling and scoring against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.native import Kernels
from tests.model.native.inputs import random_of


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
    size=st.integers(1, 300) | st.sampled_from([511, 512, 513, 3000]),
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
    logits = random_of(1, size, seed=seed, scale=scale)

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
    assert draw(torch.cat((random_of(3, size, seed=seed + 1), logits)))[3] == token
    assert draw(logits, temperature=0.0) == [int((logits[0] == logits[0].max()).nonzero()[0])]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (0, 0.9, 0.0), (5, 0.9, 0.0), (0, 1.0, 0.1)])
def test_what_is_not_a_number_draws_some_token(
    kernels: Kernels, bad: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Of its own row: others are as they would be without it."""
    logits = random_of(3, 700, seed=1)
    columns = {"temperature": 0.8, "top_p": top_p, "min_p": min_p}

    def draw(rows: Tensor) -> list[int]:
        filled = {name: torch.full((3,), value) for name, value in columns.items()}
        uniform = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        return kernels.draw(rows, **filled, top_k=torch.full((3,), top_k), uniform=uniform).tolist()

    wanted = draw(logits)
    for places in (slice(5, 6), slice(0, 700)):
        broken = logits.clone()
        broken[1, places] = bad
        found = draw(broken)
        assert 0 <= found[1] < 700 and (found[0], found[2]) == (wanted[0], wanted[2])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 90),
    best=st.integers(0, 20),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_score(kernels: Kernels, rows: int, size: int, best: int, whole: bool, seed: int) -> None:
    logits = random_of(rows, size, seed=seed, scale=4.0)
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
