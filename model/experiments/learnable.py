"""(c): a temperature that is learnt, by layer or by expert, against a fixed and a scheduled one."""

from __future__ import annotations

from typing import Any

from model.experiments.catalogue import Catalogue
from model.experiments.suite import Suite, Trained

_FROM = 0.4  # of the steps are done when it begins to be learnt


def learnable(suite: Suite) -> dict[str, Any]:
    """Mixing entropy while training, where temperatures end, and what each way costs mixing and private decoding."""
    catalogue = Catalogue(suite.scale)
    runs = {
        "fixed": catalogue.unannealed(),
        "scheduled": catalogue.kind("mot"),
        "learnt by layer": _learnt(catalogue, "layer"),
        "learnt by expert": _learnt(catalogue, "expert"),
    }
    rows = [_row(name, suite.train(run)) for name, run in runs.items()]
    fixed = rows[0]
    summary = {
        row["temperature"]: {
            "entropy_over_fixed": row["entropy"] / fixed["entropy"],
            "mixed_over_fixed": row["mixed"] / fixed["mixed"],
        }
        for row in rows[1:]
    }
    return {"rows": rows, "summary": {"learnt_from": _FROM, **summary}}


def _learnt(catalogue: Catalogue, by: str) -> Any:
    return catalogue.tempered(f"mot-learnt-{by}", temperature_mode="learnable", learn_temperature=by, learn_from=_FROM)


def _row(name: str, trained: Trained) -> dict[str, Any]:
    log = trained.log()
    every = max(1, len(log) // 100)
    mixed = trained.score("mixed")
    reached = trained.config.temperature
    private = trained.score("private", temperature=reached, skip_below=0.01)
    unmixed = trained.score("private_unmixed")
    return {
        "temperature": name,
        "mixed": mixed.perplexity,
        "private_over_mixed": private.perplexity / mixed.perplexity,
        "private_experts": private.experts_per_token,
        "unmixed_over_mixed": unmixed.perplexity / mixed.perplexity,
        "unmixed_experts": unmixed.experts_per_token,
        "entropy": log[-1]["mixing_entropy"],
        "temperatures": [log[-1]["temperature_min"], log[-1]["temperature"], log[-1]["temperature_max"]],
        "curve": [[line["step"], line["mixing_entropy"], line["temperature"]] for line in log[every - 1 :: every]],
    }
