"""Commands that judge checkpoints: calibrate, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.terminal import JsonOption, ModelOption, print_result, progress, told

app = typer.Typer()


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder, which gets the crowd and the pair.")],
    data: Annotated[Path, typer.Option(help="Text that anyone may see: the crowd comes from it.")],
    validation: Annotated[Path, typer.Option(help="Held-out text on which the default pair is chosen.")],
    windows: Annotated[int, typer.Option(min=1, help="Windows of validation text to judge on.")] = 96,
    crowds: Annotated[
        int, typer.Option(min=1, help="Crowds to try; the one beside which private rows do best stays.")
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the first crowd; the others follow.")] = 0,
    kernels: Annotated[str, typer.Option(help="auto, native or plain.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Record the reference crowd, how many of it a token must beat at T = 0, pick the default private temperature and
    skip threshold, and measure what it costs that members of a group are positions apart."""
    from model import calibrate as calibration
    from model import reference
    from model.evaluate import open_for_scoring
    from model.groups import Fill
    from model.spread import measured_curve, save_curve
    from server.loading import resolve_kernels

    with told(), progress("calibrating") as (bar, task):
        opened = open_for_scoring(model, validation, windows=windows)
        native = resolve_kernels(kernels, opened.model.device)
        seeds = range(seed, seed + crowds)
        for tested, perplexity in calibration.best_crowd(opened, opened.encode(data), model, seeds, native):
            bar.update(task, completed=(tested - seed + 1) / crowds / 2)
            print_result({"crowd": tested, "perplexity": perplexity}, as_json=as_json)
        for rivals, unmixed in calibration.best_rivals(opened, model, native):
            print_result({"rivals": rivals, **unmixed.as_dict()}, as_json=as_json)
        crowd = reference.load(model, opened.model)
        assert crowd is not None, "the crowd was just written"
        evaluator = opened.evaluator(crowd, native)
        mixed = evaluator.run("mixed", temperature=0, skip_below=0)
        tried = []
        for number, candidate in enumerate(calibration.candidates(evaluator, mixed), 1):
            tried.append(candidate)
            bar.update(task, completed=min(0.99, 0.5 + number / 20), note=f"ratio {candidate.ratio:.4f}")
            print_result({"mode": "private", **vars(candidate)}, as_json=as_json)
        curve = [(0, 0.0)]
        fill = Fill("reference", crowd)
        for apart, nats in measured_curve(
            opened.model, opened.windows, fill, lambda done: bar.update(task, completed=done)
        ):
            curve.append((apart, nats))
            print_result({"positions_apart": apart, "nats": nats}, as_json=as_json)
        save_curve(curve, model)
        chosen = calibration.choose(tried)
        calibration.save_pair(chosen, model)
        print_result({"chosen": True, **vars(chosen), "fingerprint": crowd.fingerprint}, as_json=as_json)


@app.command("eval")
def evaluate(
    data: Annotated[Path, typer.Option(help="Text file, plain or .xz.")],
    model: ModelOption = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="mixed, private, private_unmixed, zeros or alone; all. Kinds whose tokens do not meet (dense, switch, "
            "top-k) have mixed only: their plain forward pass."
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="At most so many windows; default: all of the text.")
    ] = None,
    private_temperature: Annotated[float | None, typer.Option(help="Default: the checkpoint's.")] = None,
    private_skip_below: Annotated[float | None, typer.Option(help="Default: the checkpoint's.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto, which is what serve takes here.")] = "float32",
    quantize: Annotated[str, typer.Option(help="none, or int8 for the experts' weights.")] = "none",
    kernels: Annotated[str, typer.Option(help="auto, native or plain.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity and bits per byte of a checkpoint in each way that the server can run it."""
    import torch

    from model import reference
    from model.evaluate import MODES, modes_of, open_for_scoring
    from server.loading import DEMO, load_privacy, quantize_experts, resolve_dtype, resolve_kernels

    with told(), progress("evaluating") as (bar, task):
        unknown = [name for name in mode or () if name not in MODES]
        if unknown:
            raise ValueError(f"mode: {unknown[0]!r} is not one of {', '.join(MODES)}")
        folder = model or DEMO
        chosen = resolve_dtype(dtype, torch.device("cpu"))
        opened = open_for_scoring(folder, data, windows=windows, dtype=chosen)
        if quantize not in ("none", "int8"):
            raise ValueError(f"quantize: {quantize!r} is neither none nor int8")
        if quantize == "int8":
            quantize_experts(opened.model)
        default = load_privacy(folder, opened.model.config)
        temperature = default.temperature if private_temperature is None else private_temperature
        skip_below = default.skip_below if private_skip_below is None else private_skip_below
        if not 0 <= temperature <= opened.model.config.temperature:
            raise ValueError(f"private_temperature must lie between 0 and {opened.model.config.temperature}")
        crowd = reference.load(folder, opened.model) if opened.model.config.is_grouped else None
        evaluator = opened.evaluator(crowd, resolve_kernels(kernels, opened.model.device))
        for name in [name for name in MODES if name in mode] if mode else modes_of(opened.model.config):
            bar.update(task, description=name, completed=0)
            found = evaluator.run(
                name, temperature=temperature, skip_below=skip_below,
                progress=lambda done: bar.update(task, completed=done),
            )  # fmt: skip
            print_result(found.as_dict(), as_json=as_json)
