"""``motserve bench grouping``: what each grouping policy makes of a trace of arrivals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from server.cli.bench import _list_of
from server.cli.terminal import JsonOption, print_result, progress, told


def grouping(
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV: arrival, prompt_tokens, output_tokens[, tenant]; default: the bundled one."),
    ] = None,
    speed: Annotated[float, typer.Option(help="The trace's arrivals, so many times as fast.")] = 1.0,
    shape: Annotated[str, typer.Option(help="demo, paper or mot-medium: group size, and what steps take.")] = "demo",
    step_cost: Annotated[
        str | None,
        typer.Option(help="Milliseconds a,b,c of reading the weights, a group and a row; default: measured."),
    ] = None,
    windows: Annotated[str, typer.Option(help="Comma-separated.")] = "4,16,64",
    max_groups: Annotated[
        int | None, typer.Option(min=1, help="Of the adaptive policy; default: the balance of the step cost.")
    ] = None,
    loss: Annotated[
        str,
        typer.Option(help="What distance costs: mixed, annealed (tables of a small model) or auto, the shape's own."),
    ] = "auto",
    max_align_wait: Annotated[float, typer.Option(min=0, max=60_000, help="Milliseconds, as of serve.")] = 0.0,
    max_prompt_wait: Annotated[float, typer.Option(min=0, max=60_000, help="Milliseconds, as of serve.")] = 50.0,
    max_concurrent: Annotated[int, typer.Option(min=1)] = 256,
    prefill_tokens: Annotated[int, typer.Option(min=1)] = 192,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    as_json: JsonOption = False,
) -> None:
    """Replay a trace in virtual time through scheduler and grouping: throughput, and what distance costs."""
    from server.bench.grouping import Replay, policies
    from server.bench.shapes import config_of
    from server.bench.step_cost import measure_cost, parse_cost
    from server.bench.trace import BUNDLED, read_trace
    from server.config import read_settings
    from server.engine.grouping import GroupingPolicy
    from server.engine.spread import LOSSES, loss_at
    from server.loading import DEMO, load_spread

    with told(), progress("measuring") as (bar, task):
        widths = _list_of("windows", windows, int, 1, 1_000_000)
        config = config_of(shape)
        if not config.is_mot:
            raise ValueError(f"shape: {shape!r} has no experts")
        if loss not in (*LOSSES, "auto"):
            raise ValueError(f"loss: {loss!r} is not one of {', '.join(LOSSES)}, auto")
        if not 0 < speed < float("inf"):
            raise ValueError(f"speed: {speed} is not a number above 0")
        arrivals = [replace(arrival, seconds=arrival.seconds / speed) for arrival in read_trace(trace or BUNDLED)]
        flags = {"device": device, "dtype": dtype, "kernels": kernels, "log_level": "error", "max_concurrent": 64}
        if step_cost is not None:
            cost = parse_cost(step_cost)
        else:
            settings = read_settings(flags, None)
            cost = measure_cost(shape, config, settings, lambda done: bar.update(task, completed=done))
        own = load_spread(DEMO, config) if shape == "demo" else loss_at(config.temperature)
        chosen = own if loss == "auto" else LOSSES[loss]
        adaptive = GroupingPolicy(config.group_size, None, max_groups or cost.balance, chosen)
        named = policies(config.group_size, widths, adaptive)
        for name, policy in named.items():
            bar.update(task, description=name, completed=0)
            replay = Replay(
                arrivals, policy, cost, max_running=max_concurrent, prefill_tokens=prefill_tokens,
                align_wait=max_align_wait / 1000, prompt_wait=max_prompt_wait / 1000,
            )  # fmt: skip
            result = replay.run(name, lambda done: bar.update(task, completed=done))
            about = {"shape": shape, "loss": chosen.name, "max_groups": adaptive.max_groups}
            print_result({**result.as_dict(), **about}, as_json=as_json)
