"""A GPU's passes of fixed shapes, run on the CPU, where nothing is recorded, against the plain path."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from model.groups import Fill
from server.engine import fixed_passes
from server.engine.engine import Engine
from tests.server.engine.traffic import CONFIGS, SMALL, given_requests, scores


@pytest.mark.parametrize("name", CONFIGS)
def test_against_the_plain_path(name: str, build_engine: Any, drive_engine: Any) -> None:
    config = CONFIGS[name]
    requests = given_requests(config, 24)
    plain = drive_engine(build_engine(config), requests, random.Random(1))
    fixed = drive_engine(build_engine(config, fixed=True), requests, random.Random(1))
    for request in requests:
        one, two = plain[request.request_id], fixed[request.request_id]
        assert [d.token_ids for d in one] == [d.token_ids for d in two]
        assert scores(one) == pytest.approx(scores(two), abs=2e-4)
        ours, theirs = one[-1].receipt, two[-1].receipt
        assert ours is not None and theirs is not None
        assert dataclasses.astuple(ours)[2:5] == pytest.approx(dataclasses.astuple(theirs)[2:5], abs=1e-4)


@pytest.mark.parametrize("fill", ["zeros", "none"])
def test_other_fills(fill: str, build_engine: Any, drive_engine: Any) -> None:
    def engine(fixed: bool) -> Engine:
        built: Engine = build_engine(SMALL, fixed=fixed)
        model = built.runner.model
        other = Fill.build(fill, SMALL, model.banks, None)  # type: ignore[arg-type]
        runner = type(built.runner)(model, other, blocks=1500, block_size=16, fixed=fixed)
        return Engine(runner, built.grouping, built.scheduler.limits, None, blocks=1500)

    requests = given_requests(SMALL, 16)
    plain, fixed = (drive_engine(engine(fixed), requests, random.Random(2)) for fixed in (False, True))
    for request in requests:
        ours, theirs = (scores(news[request.request_id]) for news in (plain, fixed))
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_more_rows_than_a_shape_has_and_smaller_tiles(
    build_engine: Any, drive_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then public rows take the plain path, and a private prompt's chunk reaches over several tiles."""
    requests = given_requests(SMALL, 12)
    plain = drive_engine(build_engine(SMALL), requests, random.Random(1))
    monkeypatch.setattr(fixed_passes, "_ROWS", (8,))
    monkeypatch.setattr(fixed_passes, "_TILE", 5)
    fixed = drive_engine(build_engine(SMALL, fixed=True), requests, random.Random(1))
    for request in requests:
        ours, theirs = (scores(news[request.request_id]) for news in (plain, fixed))
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_a_private_tile_holds_fewer_rows_where_they_take_much_memory(build_engine: Any) -> None:
    runner = build_engine(SMALL, fixed=True).runner
    passes = runner._compute
    assert isinstance(passes, fixed_passes.FixedPasses) and passes._tile.rows == 64
    long = SMALL.replace(n_positions=4096, n_embd=2048, n_head=8)
    with torch.device("meta"):
        model = type(runner.model)(long)
    tile = fixed_passes.FixedPasses(model, runner.fill, runner.cache, runner.tallies)._tile
    assert 1 <= tile.rows < 64
    assert passes._bytes(tile) <= fixed_passes._LARGEST
