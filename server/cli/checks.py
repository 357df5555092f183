"""Commands that put the server to the test: audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.terminal import JsonOption, ModelOption, print_result, progress, told

app = typer.Typer()


@app.command()
def audit(
    model: ModelOption = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="shared, one_hot_shared, across_tenants, private or private_unmixed; all."),
    ] = None,
    trials: Annotated[int, typer.Option(min=20, help="Of each attack.")] = 500,
    candidates: Annotated[int, typer.Option(min=2, help="Tokens that the secret is among; at most all.")] = 4096,
    seed: int = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    kernels: Annotated[str, typer.Option(help="auto, native or plain.")] = "auto",
    group_fill: Annotated[str, typer.Option(help="reference, zeros or none.")] = "reference",
    plot: Annotated[Path | None, typer.Option(help="PNG of recovery against mode; needs matplotlib.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Attack requests with requests, in each way that they can run side by side. Exit status 0: what should be
    isolated is; 1: something leaks; 2: the attacks have no power here, or a flag is wrong."""
    from server.audit import MODES, Auditor, open_engine, verdict
    from server.config import read_settings
    from server.plots import check_plotting, plot_audit

    with told(), progress("auditing") as (bar, task):
        unknown = [name for name in mode or () if name not in MODES]
        if unknown:
            raise ValueError(f"mode: {unknown[0]!r} is not one of {', '.join(MODES)}")
        if plot is not None:
            check_plotting()
        flags = {
            "dtype": dtype, "kernels": kernels, "group_fill": group_fill, "log_level": "error",
            "max_prompt_wait": "0",  # all attacks of a run come at once: nobody else is to be waited for
        }  # fmt: skip
        settings = read_settings(flags if model is None else {**flags, "model": model}, None)
        results = []
        for name in MODES:
            if mode and name not in mode:
                continue
            bar.update(task, description=name, completed=0)
            engine, default = open_engine(settings, name)
            auditor = Auditor(engine, default, trials=trials, candidates=candidates, seed=seed)
            results.append(auditor.run(name, lambda done: bar.update(task, completed=done)))
            print_result(results[-1].as_dict(), as_json=as_json)
        if plot is not None:
            plot_audit([result.as_dict() for result in results], plot)
        status, sentence = verdict(results)
        typer.echo(sentence, err=as_json)
    raise SystemExit(status)
