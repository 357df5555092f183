"""The audit breaks what mixes, finds nothing where nothing leaks, and notices when something does."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from model.checkpoint import save_model
from server.audit import ISOLATED, MODES, Auditor, AuditResult, Mode, binomial_tail, open_engine, verdict
from server.cli import app
from server.config import Settings
from server.engine.engine import Engine
from server.engine.request import EngineRequest, Privacy
from tests.model.checkpoints import DENSE, make
from tests.server.engine.conftest import build
from tests.server.engine.traffic import SMALL

GOLDEN = Path(__file__).parents[1] / "golden"


def _engine(mode: Mode) -> Engine:
    # With other weights one-hot mixing gives away too few tokens to show in 40 trials.
    engine = build(SMALL.replace(expert_size=16), seed=2)
    if mode == "one_hot_shared":
        for bank in engine.runner.model.banks:
            bank.discrete = True
    return engine


def _audit(mode: Mode, engine: Engine | None = None) -> AuditResult:
    auditor = Auditor(engine or _engine(mode), Privacy(0.5, 0.01), trials=40, candidates=97, seed=1)
    return auditor.run(mode)


@pytest.mark.parametrize("mode", MODES)
def test_shared_groups_leak_and_isolated_requests_do_not(mode: Mode) -> None:
    result = _audit(mode)
    assert result.chance == 1 / 97
    if mode in ISOLATED:
        assert result.max_abs_logprob_change == 0 == result.victim_text_changed
        assert result.isolated and not result.broken
        assert verdict([result])[0] == 0
    else:
        assert result.broken and not result.isolated
        assert result.max_abs_logprob_change > 0.01
        assert result.distinguish_accuracy > 0.9 and result.victim_text_changed > 0.1
    if mode == "shared":
        assert result.token_recovery_rate > 0.9
    if mode == "one_hot_shared":
        assert result.probe_accuracy > 0.8  # ties give equal tokens away


def test_a_leak_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that takes private requests for public ones."""
    engine = _engine("private")
    add = engine.add
    monkeypatch.setattr(engine, "add", lambda request: add(dataclasses.replace(request, privacy=None)))
    result = _audit("private", engine)
    assert not result.isolated
    assert verdict([result]) == (1, "LEAK: private")


def test_a_leak_into_the_victim_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose private requests read what ran before them."""
    engine, seen = _engine("private"), [0]
    add = engine.add

    def leaky(request: EngineRequest) -> None:
        if request.privacy is None:
            seen[0] = request.prompts[0][0]
        else:
            request = dataclasses.replace(request, prompts=((seen[0], *request.prompts[0][1:]),))
        add(request)

    monkeypatch.setattr(engine, "add", leaky)
    result = _audit("private", engine)
    assert result.max_abs_logprob_change == 0 < result.victim_text_changed
    assert verdict([result])[0] == 1


def _result(mode: Mode, **values: Any) -> AuditResult:
    harmless = {"trials": 100, "max_abs_logprob_change": 0.0, "distinguish_accuracy": 0.5, "token_recovery_rate": 0.01,
                "chance": 0.01, "victim_text_changed": 0.0, "probe_accuracy": 0.5}  # fmt: skip
    return AuditResult(mode, **{**harmless, **values})


def test_verdicts() -> None:
    broken = _result("shared", max_abs_logprob_change=3.0, distinguish_accuracy=1.0, token_recovery_rate=0.9)
    assert verdict([broken, _result("private")])[0] == 0
    assert verdict([_result("shared"), _result("private")])[0] == 2
    for leak in (
        {"max_abs_logprob_change": 1e-9},
        {"distinguish_accuracy": 0.8},
        {"token_recovery_rate": 0.2},
        {"victim_text_changed": 0.01},
        {"probe_accuracy": 0.9},
    ):
        assert verdict([broken, _result("private_unmixed", **leak)]) == (1, "LEAK: private_unmixed")


@given(st.integers(0, 9), st.integers(1, 9), st.floats(0.05, 0.95))
def test_the_binomial_tail_against_counting(successes: int, trials: int, chance: float) -> None:
    if successes > trials:
        return
    counted = sum(
        np.prod([chance if hit else 1 - chance for hit in hits])
        for hits in itertools.product((0, 1), repeat=trials)
        if sum(hits) >= successes
    )
    assert binomial_tail(successes, trials, chance) == pytest.approx(counted, abs=1e-9)


def test_the_command(tmp_path: Path) -> None:
    picture = tmp_path / "audit.png"
    arguments = ["audit", "--model", str(GOLDEN / "mot-tiny"), "--group-fill", "zeros", "--trials", "30", "--json"]
    found = CliRunner().invoke(app, [*arguments, "--plot", str(picture)])
    results = [json.loads(line) for line in found.stdout.splitlines()]
    assert [result["mode"] for result in results] == list(MODES)
    assert {"trials", "max_abs_logprob_change", "distinguish_accuracy", "token_recovery_rate", "chance"} <= set(
        results[0]
    )
    assert all(result["max_abs_logprob_change"] == 0 for result in results if result["mode"] in ISOLATED)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert found.exit_code in (0, 2), found.output
    assert CliRunner().invoke(app, ["audit", "--mode", "nonsense"]).exit_code == 2


def test_a_dense_model_has_nothing_to_audit(tmp_path: Path) -> None:
    save_model(make(DENSE), tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="never mix"):
        open_engine(Settings(model=tmp_path), "shared")
