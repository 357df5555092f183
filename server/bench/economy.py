"""MoT's economy: the paper's model, with 32 times the feed-forward parameters, against the dense one of equal FLOPs a
token (Antoniak et al., arXiv 2310.15961), beside what this machine's balance of reading and computing allows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from model.config import ModelConfig
from server.bench.engine import EngineLoad, EngineResult, bench_engine
from server.bench.machine import Limits, Machine, median_of
from server.engine.engine import Engine
from server.engine.request import Privacy


@dataclass(frozen=True)
class EconomyResult:
    """``ratio``: MoT's decode tokens a second over the dense model's; ``limit``: the same of engines that do nothing
    but read all weights once a step and multiply, each at the machine's best and at the same time."""

    concurrency: int
    mot_tokens_per_second: float
    dense_tokens_per_second: float
    groups_per_step: float
    ratio: float
    limit: float
    limits: Limits

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["limits"]
        return values | self.limits.as_dict()


def bench_economy(
    mot: Engine,
    dense: Engine,
    counts: list[int],
    machine: Machine,
    *,
    prompt_tokens: int,
    output_tokens: int,
    repeats: int,
    progress: Callable[[float], None] = lambda _: None,
) -> Iterator[EconomyResult]:
    """One result a number of public requests at once. The two models take turns."""
    for place, count in enumerate(counts):
        load = EngineLoad(count, 0.0, prompt_tokens, output_tokens)
        found: list[tuple[EngineResult, EngineResult]] = []
        for repeat in range(repeats):
            first, second = (
                next(bench_engine(engine, [load], machine, Privacy(1.0, 0.0), repeats=1)) for engine in (mot, dense)
            )
            found.append((first, second))
            progress((place * repeats + repeat + 1) / (len(counts) * repeats))
        sparse, full = (statistics.median(pair[side].output_tokens_per_second for pair in found) for side in range(2))
        groups = statistics.median(first.groups_per_step for first, _ in found)
        limits = median_of([each.limits for pair in found for each in pair])
        dtype = mot.runner.model.dtype
        least = [
            least_seconds(config, dtype, count, groups, limits)
            for config, groups in ((mot.config, -(-count // mot.config.group_size)), (dense.config, 0))
        ]
        yield EconomyResult(count, sparse, full, groups, sparse / full, least[1] / least[0], limits)


def least_seconds(config: ModelConfig, dtype: torch.dtype, rows: int, groups: int, limits: Limits) -> float:
    """A decode step of a MoT model, or (no groups) a dense one, that reads every weight once while it multiplies.
    Attention over earlier tokens is left out."""
    width, layers = config.n_embd, config.n_layer
    for_each_row = layers * 4 * width * width + config.vocab_size * width
    for_each_group = mixing = 0
    if config.is_mot:
        for_each_row += layers * width * config.n_expert
        for_each_group = layers * 2 * config.n_expert * width * config.expert_size
        mixing = layers * 2 * config.group_size * config.n_expert * width  # and redistribution
    else:
        for_each_row += layers * 2 * width * config.hidden_size
    operations = 2 * (rows * for_each_row + groups * (for_each_group + mixing))
    read = (for_each_row + for_each_group) * dtype.itemsize
    return max(read / limits.bandwidth, operations / limits.matmul)
