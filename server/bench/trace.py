"""Arrivals of requests, read from CSV or made up from a seed. Knows lengths, no text."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BUNDLED = Path(__file__).parent / "trace.csv"  # ``synthetic_trace(0)``
_COLUMNS = ("arrival", "prompt_tokens", "output_tokens", "tenant")


@dataclass(frozen=True)
class Arrival:
    """One public request: ``seconds`` from the trace's beginning; it decodes all its ``output_tokens``."""

    seconds: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""


def read_trace(path: Path) -> list[Arrival]:
    """In order of arrival. The file begins with a line of column names: arrival (seconds), prompt_tokens,
    output_tokens and, where there are several, tenant. Raises OSError, or ValueError naming the line."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        missing = [name for name in _COLUMNS[:3] if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"trace: {path}: the first line has no column {missing[0]}")
        arrivals = [_arrival(row, f"trace: {path}, line {rows.line_num}") for row in rows]
    if not arrivals:
        raise ValueError(f"trace: {path}: no requests")
    return sorted(arrivals, key=lambda arrival: arrival.seconds)


def _arrival(row: dict[str, str], place: str) -> Arrival:
    try:
        seconds, prompt, output = float(row["arrival"]), int(row["prompt_tokens"]), int(row["output_tokens"])
    except (TypeError, ValueError):
        raise ValueError(f"{place}: arrival, prompt_tokens and output_tokens must be numbers") from None
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{place}: arrival must be at least 0 seconds")
    if prompt < 1 or output < 1:
        raise ValueError(f"{place}: prompt_tokens and output_tokens must be at least 1")
    return Arrival(seconds, prompt, output, row.get("tenant") or "")


def write_trace(arrivals: Iterable[Arrival], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows((f"{a.seconds:.3f}", a.prompt_tokens, a.output_tokens, a.tenant) for a in arrivals)


def synthetic_trace(seed: int, requests: int = 400, rate: float = 12.0) -> list[Arrival]:
    """Bursts of requests, ``rate`` a second in the mean, of three kinds: questions with answers of their own length
    (60 %), long prompts with short answers (25 %) and short prompts with long answers (15 %). All fit 256 positions."""
    rng, seconds = random.Random(seed), 0.0
    arrivals: list[Arrival] = []
    while len(arrivals) < requests:
        burst = min(1 + int(rng.expovariate(1 / 3)), requests - len(arrivals))
        seconds += rng.expovariate(rate / 3.5)  # a burst has 3.5 requests in the mean, a little late in it
        for _ in range(burst):
            seconds += rng.expovariate(40 * rate)
            kind = rng.random()
            if kind < 0.6:
                prompt, output = rng.randint(8, 64), rng.randint(16, 128)
            elif kind < 0.85:
                prompt, output = rng.randint(96, 192), rng.randint(4, 48)
            else:
                prompt, output = rng.randint(4, 24), rng.randint(128, 224)
            arrivals.append(Arrival(round(seconds, 3), prompt, output))
    return arrivals
