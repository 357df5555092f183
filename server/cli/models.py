"""Commands that make and judge checkpoints: train, calibrate, eval."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from server.cli.terminal import JsonOption, ModelOption, print_result, progress, told

app = typer.Typer()


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="The run's folder; an unfinished run there is resumed.")],
    data: Annotated[list[Path], typer.Option("--data", help="Text file, plain or .xz; may be repeated.")],
    preset: Annotated[
        str, typer.Option(help="demo: the bundled checkpoint's recipe; tiny: seconds, for a try.")
    ] = "demo",
    feed_forward: Annotated[
        str | None,
        typer.Option(
            help="dense, mot, switch, top-k or expert-choice: the preset's model with such layers at equal FLOPs a "
            "token. [mot]"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows a step; a multiple of the group size.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    final_temperature: Annotated[float | None, typer.Option(help="mot: annealed to in the last part.")] = None,
    balance_weight: Annotated[
        float | None, typer.Option(help="switch, top-k: of the loss that balances experts. [0.01]")
    ] = None,
    capacity_factor: Annotated[
        float | None, typer.Option(help="switch: tokens an expert takes over an even share, in training. [1.25]")
    ] = None,
    joint_copies: Annotated[
        int | None, typer.Option(help="Sequences of a step that are also trained to decode unmixed (T = 0).")
    ] = None,
    joint_weight: Annotated[float | None, typer.Option(help="Weight of their loss.")] = None,
    joint_distill: Annotated[
        float | None, typer.Option(help="Share of the mixed mode's prediction in their target.")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of rising learning rate.")] = None,
    start_from: Annotated[Path | None, typer.Option(help="Begin with this checkpoint, not a preset's model.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between states.")] = None,
    autocast: Annotated[bool | None, typer.Option(help="bfloat16 autocast, for machines that compute in it.")] = None,
    compile: Annotated[bool | None, typer.Option(help="torch.compile; needs a C++ compiler.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model from text files."""
    changes = {
        name: value
        for name, value in locals().items()
        if name not in ("out", "data", "preset", "feed_forward", "start_from", "as_json") and value is not None
    }
    from model.recipe import preset_named
    from model.train import Trainer

    with told(), progress("training") as (bar, task):
        if feed_forward is not None and start_from is not None:
            raise ValueError("feed_forward: start_from's checkpoint has its own")
        config, settings = preset_named(preset, changes, feed_forward=feed_forward or "mot")
        out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer.prepare(config, settings, data, out, start=start_from)
        if trainer.resume():
            print(f"resumed at step {trainer.step}", file=sys.stderr)
        for step in trainer.run():
            note = f"loss {step.loss:.3f}  T {step.temperature:.3f}  {step.tokens_per_second:.0f} tokens/s"
            bar.update(task, completed=step.step / step.steps, note=note)
            if as_json:
                print(json.dumps(step.as_dict()), flush=True)


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
    """Record the reference crowd and pick the default private temperature and skip threshold."""
    from model import calibrate as calibration
    from model import reference
    from model.evaluate import open_for_scoring
    from server.loading import resolve_kernels

    with told(), progress("calibrating") as (bar, task):
        opened = open_for_scoring(model, validation, windows=windows)
        native = resolve_kernels(kernels, opened.model.device)
        seeds = range(seed, seed + crowds)
        for tested, perplexity in calibration.best_crowd(opened, opened.encode(data), model, seeds, native):
            bar.update(task, completed=(tested - seed + 1) / crowds / 2)
            print_result({"crowd": tested, "perplexity": perplexity}, as_json=as_json)
        crowd = reference.load(model, opened.model)
        assert crowd is not None, "the crowd was just written"
        evaluator = opened.evaluator(crowd, native)
        mixed = evaluator.run("mixed", temperature=0, skip_below=0)
        tried = []
        for number, candidate in enumerate(calibration.candidates(evaluator, mixed), 1):
            tried.append(candidate)
            bar.update(task, completed=min(0.99, 0.5 + number / 20), note=f"ratio {candidate.ratio:.4f}")
            print_result({"mode": "private", **vars(candidate)}, as_json=as_json)
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
