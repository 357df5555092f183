"""The engine under a closed loop: how many are under way, who is private, what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from server.bench.engine import EngineLoad, bench_engine
from server.bench.machine import Machine
from server.cli import app
from server.config import Settings
from server.engine.engine import Engine
from server.engine.request import Delta, EngineRequest, Privacy
from server.loading import load

GOLDEN = Path(__file__).parents[2] / "golden" / "mot-tiny"
SIZES = ("--model", str(GOLDEN), "--prompt-tokens", "4", "--output-tokens", "6", "--repeats", "2", "--json")


class Watched:
    """Notes what an engine is given, and how many requests were under way when a step began."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.added: list[EngineRequest] = []
        self.steps: list[tuple[int, int]] = []  # requests under way, and those begun so far
        self._ended = 0
        add, step = engine.add, engine.step

        def noted_add(request: EngineRequest) -> None:
            self.added.append(request)
            add(request)

        def noted_step() -> list[tuple[str, Delta]]:
            self.steps.append((len(self.added) - self._ended, len(self.added)))
            news = step()
            self._ended += sum(delta.finish_reason is not None for _, delta in news)
            return news

        monkeypatch.setattr(engine, "add", noted_add)
        monkeypatch.setattr(engine, "step", noted_step)


def test_each_end_lets_the_next_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(Settings(model=GOLDEN)).engine.direct
    watched = Watched(engine, monkeypatch)
    asked = EngineLoad(3, 0.5, 9, 5, spread=6, requests=10, temperature=0.0)
    (result,) = bench_engine(
        engine, [asked], Machine(torch.device("cpu"), torch.float32), Privacy(0.05, 0.0), repeats=1
    )
    assert len(watched.added) == 3 + 10, "the first three warm up"
    assert all(under_way == 3 for under_way, begun in watched.steps if begun != 13 and begun != 3)
    assert max(watched.steps)[0] == 3
    measured = watched.added[3:]
    assert [request.privacy is not None for request in measured] == [True, False] * 5
    assert {request.sampling.temperature for request in measured} == {0.0}
    assert result.requests == 10 and result.whole_tokens_per_second >= result.output_tokens_per_second > 0


@pytest.mark.parametrize(("stagger", "second"), [(3, 3), (9, 5)])  # steps; the first has ended after five
def test_the_first_begin_one_after_the_other(monkeypatch: pytest.MonkeyPatch, stagger: int, second: int) -> None:
    engine = load(Settings(model=GOLDEN)).engine.direct
    watched = Watched(engine, monkeypatch)
    asked = EngineLoad(3, 0.0, 9, 5, requests=8, temperature=0.0, stagger=stagger)
    (result,) = bench_engine(
        engine, [asked], Machine(torch.device("cpu"), torch.float32), Privacy(0.05, 0.0), repeats=1
    )
    begun_by = [begun - 3 for _, begun in watched.steps if begun > 3]
    assert begun_by.index(2) == second and len(watched.added) == 3 + 8
    assert result.whole_tokens_per_second > 0 and result.step_seconds > 0


def test_outputs_that_end_before_the_last_prompt() -> None:
    """Then never all decode at once: what counts is the steps in which the most do, and how many that was is said."""
    engine = load(Settings(model=GOLDEN, prefill_tokens=4)).engine.direct
    loads = [EngineLoad(3, 0.0, 9, 1), EngineLoad(2, 0.0, 1, 4)]
    early, usual = bench_engine(
        engine, loads, Machine(torch.device("cpu"), torch.float32), Privacy(0.05, 0.0), repeats=2
    )
    assert early.decoding < 3 and early.step_seconds > 0
    assert usual.decoding == 2 and usual.output_tokens_per_second > 0


def test_requests_of_a_command() -> None:
    found = CliRunner().invoke(app, ["bench", "engine", "--concurrency", "2,3", "--requests", "7", *SIZES])
    assert found.exit_code == 0, found.output
    results = [json.loads(line) for line in found.stdout.splitlines()]
    assert [(each["concurrency"], each["requests"]) for each in results] == [(c, 7) for c in (2, 3) for _ in range(3)]
    for each in results:
        parts = [each[f"{part}_share"] for part in ("scheduling", "grouping", "model", "sampling", "results")]
        assert 0.5 < sum(parts) < 1.01
        assert each["whole_tokens_per_second"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("--requests", "0"),
        ("--requests", "-3"),
        ("--requests", "2", "--concurrency", "1,3"),
        ("--requests", "9", "--concurrency", "3", "--baseline"),
        ("--temperature", "3"),
        ("--stagger", "2"),
        ("--stagger", "-1", "--requests", "9"),
    ],
)
def test_a_mistake_names_its_field(arguments: tuple[str, ...]) -> None:
    found = CliRunner().invoke(app, ["bench", "engine", *SIZES, *arguments])
    assert found.exit_code == 2 and "Traceback" not in found.output
    named = "baseline" if "--baseline" in arguments else arguments[0].strip("-")
    assert named in found.stderr
