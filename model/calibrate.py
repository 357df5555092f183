"""Calibration of a trained checkpoint: its reference crowd, its default private temperature and threshold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model import reference
from model.config import ModelConfig
from model.errors import TrainingError
from model.evaluate import Evaluation, Evaluator, Opened
from model.files import write_json
from model.native import Kernels
from model.transformer import Transformer

PRIVATE_FILE = "private.json"
TOLERANCE = 1.005  # perplexity of the default pair over that of mixing, at most

# Thresholds below which an expert's redistribution weight is skipped, and temperatures as fractions of the model's.
_SKIP_BELOW = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08)
_FRACTIONS = (1.0, 0.7)


@dataclass(frozen=True)
class Candidate:
    temperature: float
    skip_below: float
    ratio: float  # perplexity over that of mixing
    experts_per_token: float


def record_crowd(model: Transformer, stream: np.ndarray, folder: Path, *, seed: int) -> reference.ReferenceCrowd:
    """Run G windows of the stream, drawn by ``seed``, as one group and store what the layers saw. Raises
    TrainingError when the stream is too short for G different windows or the model has no groups."""
    if not model.config.is_grouped:
        raise TrainingError(f"model: a {model.config.model_type} model does not mix: it needs no crowd")
    size, length = model.config.group_size, model.config.n_positions
    count = len(stream) // length
    if count < size:
        raise TrainingError(f"data: {len(stream)} tokens are fewer than {size} windows of {length}")
    chosen = np.random.default_rng(seed).choice(count, size, replace=False)
    ids = torch.from_numpy(np.stack([stream[i * length : (i + 1) * length] for i in chosen]).astype(np.int64))
    reference.save(reference.record(model, ids), folder, torch.bfloat16)
    crowd = reference.load(folder, model)
    assert crowd is not None, "the crowd was just written"
    return crowd


def best_crowd(
    opened: Opened, stream: np.ndarray, folder: Path, seeds: Iterable[int], kernels: Kernels | None
) -> Iterator[tuple[int, float]]:
    """Every seed and the perplexity of private rows beside its crowd, with all experts; in the end the crowd of the
    best seed is the one recorded in ``folder``."""
    found = []
    for seed in seeds:
        crowd = record_crowd(opened.model, stream, folder, seed=seed)
        evaluator = opened.evaluator(crowd, kernels)
        temperature = opened.model.config.temperature
        found.append((evaluator.run("private", temperature=temperature, skip_below=0).perplexity, seed))
        yield seed, found[-1][0]
    record_crowd(opened.model, stream, folder, seed=min(found)[1])


def rival_counts(config: ModelConfig) -> range:
    """How many members a row at temperature 0 might have to beat: all G - 1, and fewer in about seven steps."""
    most = config.group_size - 1
    return range(most, 0, -max(1, most // 7))


def most_unmixed_experts(config: ModelConfig) -> float:
    """What a token may use at temperature 0: twice what it would on average if each expert took one of G."""
    return 2 * config.n_expert / config.group_size


def best_rivals(
    opened: Opened, folder: Path, kernels: Kernels | None, *, most_experts: float | None = None
) -> Iterator[tuple[int, Evaluation]]:
    """How many of its members a row at temperature 0 should have to beat, and what it does then; in the end the best
    number stands in the folder's crowd. Fewer rivals leave a token more experts, and the loss is least
    somewhere below all. None below all is taken that uses more than ``most_experts`` a token (None: ``2 E / G``)."""
    crowd = reference.load(folder, opened.model)
    assert crowd is not None, "recorded before"
    config = opened.model.config
    found: list[tuple[float, int]] = []
    limit = most_unmixed_experts(config) if most_experts is None else most_experts
    for rivals in rival_counts(config):
        crowd.rivals = rivals
        score = opened.evaluator(crowd, kernels).run("private_unmixed", temperature=0, skip_below=0)
        if found and score.experts_per_token > limit:
            break
        found.append((score.perplexity, rivals))
        yield rivals, score
    if found:
        reference.set_rivals(folder, min(found)[1])


def candidates(evaluator: Evaluator, mixed: Evaluation) -> Iterator[Candidate]:
    """Every pair worth trying; for one temperature, thresholds rise until the loss is clearly too high."""
    for fraction in _FRACTIONS if evaluator.config.temperature else _FRACTIONS[:1]:
        temperature = round(evaluator.config.temperature * fraction, 6)
        for skip_below in _SKIP_BELOW:
            found = evaluator.run("private", temperature=temperature, skip_below=skip_below)
            ratio = found.perplexity / mixed.perplexity
            yield Candidate(temperature, skip_below, ratio, found.experts_per_token)
            if ratio > 2 * TOLERANCE - 1:
                break


def choose(tried: list[Candidate]) -> Candidate:
    """The fewest experts among those within tolerance of mixing; if none is, the one that loses least."""
    within = [candidate for candidate in tried if candidate.ratio <= TOLERANCE]
    if within:
        return min(within, key=lambda candidate: (candidate.experts_per_token, candidate.ratio))
    return min(tried, key=lambda candidate: candidate.ratio)


def save_pair(chosen: Candidate, folder: Path) -> None:
    """Write ``private.json``, whole or not at all."""
    values = {
        "private_temperature": chosen.temperature,
        "private_skip_below": chosen.skip_below,
        "perplexity_over_mixing": round(chosen.ratio, 5),
        "experts_per_token": round(chosen.experts_per_token, 2),
    }
    write_json(folder / PRIVATE_FILE, values)
