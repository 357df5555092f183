"""(f): private decoding at temperatures from the checkpoint's to 0, after annealing and after transition tuning.

Transition tuning goes on from a checkpoint that mixes, for a fraction of its steps, so that T = 0 works: an expert is
used exactly when a token beats the whole reference crowd. The control goes on for as long without it, and what others
mix is told against it. The annealed model had as many steps in all.
"""

from __future__ import annotations

from typing import Any

from model.calibrate import TOLERANCE, Candidate, choose, most_unmixed_experts, rival_counts
from model.evaluate import Evaluation
from model.experiments.catalogue import Catalogue
from model.experiments.suite import Suite, Trained

_TEMPERATURES = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.0)  # over that at which training ended
_SKIPS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12)
_SKIP_BELOW = 0.01  # of the curves over temperature
_FRACTIONS = (1.0, 0.7)
_MIXING_MAY_LOSE = 1.01  # perplexity of mixing over the control's, at most
CONTROL = "control"


def private_temperature(suite: Suite) -> dict[str, Any]:
    """Perplexity over mixing and experts a token at each temperature, and a table of the ways to tune."""
    catalogue = Catalogue(suite.scale)
    checkpoints = {"annealed": catalogue.private_annealed()} | catalogue.transitions()
    trained = {name: suite.train(run) for name, run in checkpoints.items()}
    control = trained[CONTROL].score("mixed").perplexity
    ways = [_way(name, found, control) for name, found in trained.items()]
    fair = [way for way in ways if way["mixed_over_control"] <= _MIXING_MAY_LOSE]  # the control itself is
    best, closest = (min(some, key=lambda way: way["unmixed"]["perplexity"])["checkpoint"] for some in (fair, ways))
    shown = dict.fromkeys(("annealed", CONTROL, best, closest))
    rows = [row for name in shown for row in _by_temperature(name, trained[name])]
    summary = {"ways": ways, "best": best, "closest": closest, "experts": suite.scale.config.n_expert}
    return {"rows": rows, "summary": summary}


def _way(name: str, trained: Trained, control: float) -> dict[str, Any]:
    mixed = trained.score("mixed").perplexity
    rivals, unmixed = _best_rivals(trained)
    strict = trained.score("private_unmixed")
    return {
        "checkpoint": name,
        "mixed": mixed,
        "mixed_over_control": mixed / control,
        "unmixed": {"rivals": rivals, **_against(unmixed, mixed, control)},
        "unmixed_all_rivals": _against(strict, mixed, control),
        "pair": vars(_pair(trained, mixed)),
    }


def _against(found: Evaluation, mixed: float, control: float) -> dict[str, float]:
    return {
        "perplexity": found.perplexity,
        "over_mixed": found.perplexity / mixed,
        "over_control": found.perplexity / control,
        "experts_per_token": found.experts_per_token,
    }


def _best_rivals(trained: Trained) -> tuple[int, Evaluation]:
    """How many of the crowd a row at T = 0 had best have to beat, as calibration chooses, and what it does then."""
    tried: dict[int, Evaluation] = {}
    for rivals in rival_counts(trained.config):
        found = trained.score("private_unmixed", rivals=rivals)
        if tried and found.experts_per_token > most_unmixed_experts(trained.config):
            break
        tried[rivals] = found
    return min(tried.items(), key=lambda one: one[1].perplexity)


def _pair(trained: Trained, mixed: float) -> Candidate:
    """The default pair that calibration would choose."""
    tried = []
    for fraction in _FRACTIONS:
        temperature = round(trained.config.temperature * fraction, 6)
        for skip_below in _SKIPS:
            found = trained.score("private", temperature=temperature, skip_below=skip_below)
            tried.append(Candidate(temperature, skip_below, found.perplexity / mixed, found.experts_per_token))
            if tried[-1].ratio > 2 * TOLERANCE - 1:
                break
    return choose(tried)


def _by_temperature(name: str, trained: Trained) -> list[dict[str, Any]]:
    mixed = trained.score("mixed").perplexity
    rows = []
    for fraction in _TEMPERATURES:
        temperature = fraction * trained.config.temperature
        skip_below = _SKIP_BELOW if temperature else 0.0
        found = trained.score("private", temperature=temperature, skip_below=skip_below)
        rows.append(
            {"checkpoint": name, "temperature": temperature, "skip_below": skip_below,
             "over_mixed": found.perplexity / mixed, "experts_per_token": found.experts_per_token}
        )  # fmt: skip
    return rows
