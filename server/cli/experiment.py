"""The command that shows the claims about Mixture of Tokens: experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.terminal import JsonOption, print_result, progress, told

app = typer.Typer()


@app.command()
def experiment(
    name: Annotated[
        str,
        typer.Argument(
            help="steps, kinds, learnable, group-size, distance, private-temperature, crowds, or all.",
            show_default=False,
        ),
    ],
    data: Annotated[Path, typer.Option(help="Text to train on, plain or .xz.")],
    validation: Annotated[Path, typer.Option(help="Held-out text that everything is judged on.")],
    out: Annotated[
        Path,
        typer.Option(help="Folder of the runs, which experiments share, and of NAME.json and NAME.png; resumed."),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind in steps and kinds.")] = 3,
    scale: Annotated[str, typer.Option(help="small: as in docs/results.md; tiny: seconds, for a try.")] = "small",
    kernels: Annotated[str, typer.Option(help="auto, native or plain; for private rows.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train what an experiment needs, measure, write a JSON file and a picture. What is there already is not done
    again, and a run that was stopped goes on."""
    import torch

    from model.experiments.experiments import experiments_named, run
    from model.experiments.scales import scale_named
    from model.experiments.suite import Suite
    from server.experiment_plots import plot_experiment
    from server.loading import resolve_kernels
    from server.plots import check_plotting

    with told(), progress("experiments") as (bar, task):
        chosen, size = experiments_named(name), scale_named(scale)
        check_plotting()

        def tell(doing: str, done: float) -> None:
            bar.update(task, description=doing, completed=done)

        native = resolve_kernels(kernels, torch.device("cpu"))
        suite = Suite.open(out, size, data, validation, seeds=seeds, tell=tell, kernels=native)
        for one in chosen:
            result = run(one, suite)
            plot_experiment(result, out / f"{one.name}.png")
            _print(result, as_json=as_json)


def _print(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result), flush=True)
        return
    for row in result["rows"]:
        plain = {key: value for key, value in row.items() if not isinstance(value, (list, dict))}
        print_result({"experiment": result["experiment"], **plain}, as_json=False)
