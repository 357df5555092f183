"""What distance costs: measured against the same groups made by hand, stored, and read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.attention import attend_whole_sequences
from model.errors import CheckpointError
from model.groups import Fill
from model.mixing import WholeSequences
from model.spread import (
    SPREAD_FILE,
    apart_losses,
    full_steps,
    head_starts,
    load_curve,
    measured_curve,
    save_curve,
    spreads_of,
)  # fmt: skip
from model.transformer import Transformer
from tests.model.runs import CONFIG


@pytest.fixture
def model() -> Transformer:
    model = Transformer(CONFIG.replace(temperature=0.3))
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that it matters who is mixed with whom
    return model


def _windows(count: int) -> torch.Tensor:
    return torch.randint(
        0, CONFIG.vocab_size, (count, CONFIG.n_positions + 1), generator=torch.Generator().manual_seed(1)
    )


@torch.inference_mode()
def test_members_at_equal_positions_are_mixed_as_in_training(model: Transformer) -> None:
    ids = _windows(4)
    length = ids.shape[1] - 1
    hidden = model(
        ids[:, :-1].flatten(), torch.arange(length).repeat(4),
        lambda _, qkv: attend_whole_sequences(qkv, 4, CONFIG.n_head), WholeSequences(model.config, 4),
    )  # fmt: skip
    wanted = torch.nn.functional.cross_entropy(model.logits(hidden), ids[:, 1:].flatten(), reduction="none")
    assert torch.allclose(apart_losses(model, ids, Fill("none", None), 0).flatten(), wanted, atol=1e-4)


def test_the_curve_is_what_distance_adds_to_the_same_tokens(model: Transformer) -> None:
    windows, fill = _windows(9), Fill("none", None)  # the ninth makes no whole group
    curve = dict(measured_curve(model, windows, fill))
    assert list(curve) == [1, 4, 8]
    added, highest = {}, 0.0
    for apart in curve:
        counted = full_steps(head_starts(4, apart), 16)
        added[apart] = sum(
            float((apart_losses(model, ids, fill, apart) - apart_losses(model, ids, fill, 0))[counted].sum())
            for ids in windows[:8].split(4)
        ) / (2 * int(counted.sum()))
        highest = max(highest, added[apart])
        assert curve[apart] == pytest.approx(highest, abs=1e-5)
    assert max(map(abs, added.values())) > 1e-3, "distance changes something"


def test_too_few_windows_are_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="3 are fewer than one group of 4"):
        next(measured_curve(model, _windows(3), Fill("none", None)))


@given(st.integers(1, 5000))
def test_distances_reach_half_of_a_window(length: int) -> None:
    found = spreads_of(length)
    assert found == sorted(set(found)) and found[0] == 1 and found[-1] == max(1, length // 2)


@given(st.dictionaries(st.integers(1, 10_000), st.floats(0, 9), max_size=9))
def test_what_is_saved_is_read(points: dict[int, float]) -> None:
    import tempfile

    highest, curve = 0.0, [(0, 0.0)]
    for spread in sorted(points):
        highest = max(highest, points[spread])
        curve.append((spread, highest))
    with tempfile.TemporaryDirectory() as folder:
        assert load_curve(Path(folder)) is None
        save_curve(curve, Path(folder))
        found = load_curve(Path(folder))
    assert found is not None and [spread for spread, _ in found] == [spread for spread, _ in curve]
    assert all(abs(a - b) < 1e-5 for (_, a), (_, b) in zip(found, curve, strict=True))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([], "grouping.json"),
        ({"spreads": [0, 4]}, "nats"),
        ({"spreads": [1, 4], "nats": [0, 1]}, "spreads must ascend from 0"),
        ({"spreads": [0, 4, 4], "nats": [0, 1, 1]}, "spreads must ascend from 0"),
        ({"spreads": [0, 4], "nats": [0]}, "nats must be"),
        ({"spreads": [0, 4], "nats": [0, math.nan]}, "nats must be"),
        ({"spreads": [0, 4, 8], "nats": [0, 0.2, 0.1]}, "never falling"),
        ({"spreads": [0, math.inf], "nats": [0, 1]}, "OverflowError"),
    ],
)
def test_a_damaged_curve_is_refused(tmp_path: Path, values: object, named: str) -> None:
    (tmp_path / SPREAD_FILE).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=named):
        load_curve(tmp_path)
