"""(a), (b): in how many steps, and in how much time, MoT reaches the final loss of other kinds with equal FLOPs."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from model.experiments.catalogue import Catalogue
from model.experiments.suite import Suite, Trained
from model.train import Trainer

_SHARE = 0.5  # of the steps, with a schedule of their own
_TIMED_STEPS = 12


def steps(suite: Suite) -> dict[str, Any]:
    """MoT against dense, with the time of a step of each; MoT on a schedule of half of the steps; and MoT as it is
    trained for private decoding too."""
    result = _against(suite, ("dense",), ways=True)
    result["summary"] |= _wall_clock(suite, result["summary"]["step_ratio"]["dense"]["mean"])
    return result


def kinds(suite: Suite) -> dict[str, Any]:
    """MoT against Switch and Expert Choice, dense beside them."""
    return _against(suite, ("switch", "expert-choice", "dense"), ways=False)


def reaches(curve: list[tuple[int, float]], loss: float) -> float | None:
    """The step at which a validation curve first comes down to ``loss``, between its points in a straight line; None
    if it never does."""
    before = curve[0]
    for point in curve:
        if point[1] <= loss:
            if point is curve[0]:
                return float(point[0])
            return before[0] + (point[0] - before[0]) * (before[1] - loss) / (before[1] - point[1])
        before = point
    return None


def _against(suite: Suite, others: tuple[str, ...], *, ways: bool) -> dict[str, Any]:
    """``ways``: other ways to train MoT beside it, against the last of the ``others``."""
    catalogue, rows = Catalogue(suite.scale), []
    ratios: dict[str, list[float | None]] = {kind: [] for kind in others}
    annealed_ratios: list[float | None] = []
    gaps: list[float] = []
    for seed in range(suite.seeds):
        mot = suite.train(catalogue.mixing(seed))
        rows.append(_row("mot", seed, mot))
        for kind in others:
            other = _row(kind, seed, suite.train(catalogue.kind(kind, seed)))
            rows.append(other)
            ratios[kind].append(_step_ratio(mot, other["loss"]))
        if ways:
            annealed = suite.train(catalogue.kind("mot", seed))
            shorter = _row("mot", seed, suite.train(catalogue.mixing(seed, share=_SHARE)))
            rows += [_row("mot, annealed", seed, annealed), shorter]
            annealed_ratios.append(_step_ratio(annealed, other["loss"]))
            gaps.append(shorter["loss"] - other["loss"])
    summary: dict[str, Any] = {"step_ratio": {kind: spread(found) for kind, found in ratios.items()}}
    if ways:
        summary["step_ratio_annealed"] = spread(annealed_ratios)
        summary["half_the_steps_minus_dense"] = spread(list(gaps))
    return {"rows": rows, "summary": summary}


def _step_ratio(mot: Trained, loss: float) -> float | None:
    reached = reaches(mot.curve(), loss)
    return None if reached is None else reached / mot.run.settings.steps


def _row(kind: str, seed: int, trained: Trained) -> dict[str, Any]:
    curve = trained.curve()
    return {
        "kind": kind,
        "seed": seed,
        "steps": trained.run.settings.steps,
        "learning_rate": trained.run.settings.learning_rate,
        "parameters": trained.model.parameter_count,
        "loss": curve[-1][1],
        "curve": curve,
    }


def spread(values: list[float | None]) -> dict[str, Any]:
    """Mean, least and greatest of those that are there; ``missing`` says how many are not."""
    there = [value for value in values if value is not None]
    found: dict[str, Any] = {"values": values, "missing": len(values) - len(there)}
    for name, of in (("mean", statistics.fmean), ("least", min), ("greatest", max)):
        found[name] = of(there) if there else None
    return found


def _wall_clock(suite: Suite, ratio: float | None) -> dict[str, Any]:
    """Seconds of a step of each kind, measured once, in turn, so that the machine's moods meet both alike."""
    catalogue = Catalogue(suite.scale)
    dense, mot = catalogue.kind("dense"), catalogue.mixing()
    seconds = suite.train(mot).measured("seconds a step", lambda: _time(suite, {"dense": dense, "mot": mot}))
    slower = seconds["mot"] / seconds["dense"]
    return {"seconds_per_step": seconds, "wall_clock_ratio": None if ratio is None else ratio * slower}


def _time(suite: Suite, runs: dict[str, Any]) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        trainers = {
            name: Trainer(run.config, run.settings, suite.corpus.train, Path(folder)) for name, run in runs.items()
        }
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(_TIMED_STEPS):
            for name, trainer in trainers.items():
                began = time.perf_counter()
                trainer.train_step()
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[2:]) for name, found in taken.items()}  # the first ones warm up
