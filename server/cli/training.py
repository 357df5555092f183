"""The command that makes checkpoints: train."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.terminal import JsonOption, progress, told

app = typer.Typer()

_MODEL, _SHAPE, _STEP, _RATE, _TEMPERATURE = (
    "Model", "Sizes of the model (config.json's names)", "Steps and batches", "Optimizer", "Temperature (mot)",
)  # fmt: skip
_PRIVATE, _ROUTING, _OUT, _MACHINE = "Unmixed decoding (mot)", "Token choice (switch, top-k)", "Output", "Machine"


def _option(help: str, panel: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, show_default=False, **more)


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="The run's folder; an unfinished run there is resumed.")],
    data: Annotated[list[Path], typer.Option("--data", help="Text file, plain or .xz; may be repeated.")],
    preset: Annotated[
        str,
        typer.Option(
            help="demo: the bundled checkpoint's shape; tiny: seconds, for a try; paper: the small model of "
            "arXiv 2310.15961; mot-medium: the published checkpoint's shape. Options without a value of their own "
            "have the preset's.",
            rich_help_panel=_MODEL,
        ),
    ] = "demo",
    feed_forward: Annotated[
        str | None,
        _option(
            "dense, mot, switch, top-k or expert-choice: the preset's model with such layers at equal FLOPs a token; "
            "default: mot.",
            _MODEL,
        ),
    ] = None,
    start_from: Annotated[Path | None, _option("Begin with this checkpoint, not a preset's model.", _MODEL)] = None,
    seed: Annotated[int | None, _option("Of the first weights and the order of the data.", _MODEL)] = None,
    vocab_size: Annotated[int | None, _option("Tokens that the run's tokenizer may learn.", _SHAPE)] = None,
    n_positions: Annotated[int | None, _option("Longest context in tokens.", _SHAPE)] = None,
    n_embd: Annotated[int | None, _option("Width; a multiple of the heads.", _SHAPE)] = None,
    n_layer: Annotated[int | None, _option("Layers.", _SHAPE)] = None,
    n_head: Annotated[int | None, _option("Attention heads.", _SHAPE)] = None,
    group_size: Annotated[
        int | None, _option("Tokens that are mixed; may also differ from that of start-from's checkpoint.", _SHAPE)
    ] = None,
    n_expert: Annotated[int | None, _option("Experts of a layer.", _SHAPE)] = None,
    expert_size: Annotated[int | None, _option("Hidden units of an expert.", _SHAPE)] = None,
    temperature: Annotated[
        float | None, _option("Of mixing, where training begins; may also differ from that checkpoint's.", _SHAPE)
    ] = None,
    steps: Annotated[int | None, _option("Optimizer steps.", _STEP)] = None,
    batch: Annotated[int | None, _option("Windows a step; a multiple of the group size.", _STEP)] = None,
    length: Annotated[int | None, _option("Tokens of a window.", _STEP)] = None,
    accumulate: Annotated[
        int | None, _option("Micro-batches that a step's batch is computed in; each a multiple of the group.", _STEP)
    ] = None,
    optimizer: Annotated[str | None, _option("adamw, or muon for the weight matrices.", _RATE)] = None,
    learning_rate: Annotated[float | None, _option("The peak.", _RATE)] = None,
    matrix_rate: Annotated[float | None, _option("Muon's rate over AdamW's.", _RATE)] = None,
    warmup: Annotated[int | None, _option("Steps of rising rate.", _RATE)] = None,
    final_rate_fraction: Annotated[float | None, _option("Of the peak, which the cosine ends at.", _RATE)] = None,
    weight_decay: Annotated[float | None, _option("Of weight matrices.", _RATE)] = None,
    clip: Annotated[float | None, _option("Largest norm of the gradients.", _RATE)] = None,
    temperature_mode: Annotated[str | None, _option("fixed, scheduled or learnable.", _TEMPERATURE)] = None,
    final_temperature: Annotated[
        str | None, _option("scheduled: annealed to; one for all layers or, with commas, one a layer.", _TEMPERATURE)
    ] = None,
    anneal_from: Annotated[
        float | None, _option("scheduled: fraction of the steps before annealing begins.", _TEMPERATURE)
    ] = None,
    learn_temperature: Annotated[
        str | None, _option("learnable: one a layer, or one an expert of each layer.", _TEMPERATURE)
    ] = None,
    learn_from: Annotated[
        float | None, _option("learnable: fraction of the steps before learning begins.", _TEMPERATURE)
    ] = None,
    temperature_rate: Annotated[
        float | None, _option("learnable: rate of the logarithm over AdamW's.", _TEMPERATURE)
    ] = None,
    joint_copies: Annotated[
        int | None, _option("Sequences of a step that are also trained to decode unmixed (T = 0).", _PRIVATE)
    ] = None,
    joint_weight: Annotated[float | None, _option("Weight of their loss.", _PRIVATE)] = None,
    joint_distill: Annotated[
        float | None, _option("Share of the mixed mode's prediction in their target.", _PRIVATE)
    ] = None,
    joint_rivals: Annotated[
        int | None, _option("Members of its group that a copy must beat to have an expert; default: all.", _PRIVATE)
    ] = None,
    balance_weight: Annotated[float | None, _option("Of the loss that balances experts.", _ROUTING)] = None,
    capacity_factor: Annotated[
        float | None,
        _option("switch: tokens an expert takes over an even share, in training.", _ROUTING),
    ] = None,
    validation: Annotated[
        Path | None, _option("Held-out text, on which the run is evaluated as it goes.", _OUT)
    ] = None,
    eval_every: Annotated[int | None, _option("Steps between evaluations.", _OUT)] = None,
    eval_windows: Annotated[int | None, _option("Windows of held-out text.", _OUT)] = None,
    save_every: Annotated[int | None, _option("Steps between states.", _OUT)] = None,
    export_dtype: Annotated[str | None, _option("Of the checkpoint's weights: bfloat16 or float32.", _OUT)] = None,
    shard_size: Annotated[
        str | None, _option("Largest file of the checkpoint's weights, such as 2GB; default: one file.", _OUT)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_MACHINE)] = "auto",
    autocast: Annotated[bool | None, _option("bfloat16 autocast, for machines that compute in it.", _MACHINE)] = None,
    compile: Annotated[bool | None, _option("torch.compile; needs a C++ compiler.", _MACHINE)] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model from text files.

    Several processes train one model together, each on its part of every batch:
    torchrun --nproc-per-node 2 -m server train OUT --data FILE ...
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from model.config import ModelConfig
    from model.recipe import SHAPE, preset_named
    from model.train import Trainer
    from model.workers import joined

    with told(), joined(device) as workers, progress("training", shown=workers.is_first) as (bar, task):
        if feed_forward is not None and start_from is not None:
            raise ValueError("feed_forward: start_from's checkpoint has its own")
        for name in ("eval_every", "eval_windows"):
            if name in given and validation is None:
                raise ValueError(f"{name}: only with validation")
        start = None if start_from is None else ModelConfig.load(start_from)
        shape = {name: given[name] for name in SHAPE if name in given}
        config, settings = preset_named(
            preset, _changes(given), shape=shape, feed_forward=feed_forward or "mot", start=start
        )
        out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer.prepare(config, settings, data, out, start=start_from, workers=workers, validation=validation)
        if trainer.resume() and workers.is_first:
            print(f"resumed at step {trainer.step}", file=sys.stderr)
        held_out = ""
        for step in trainer.run():
            if step.validation_perplexity is not None:
                held_out = f"  validation perplexity {step.validation_perplexity:.2f}"
            if step.validation_bits_per_byte is not None:
                held_out += f" ({step.validation_bits_per_byte:.3f} bits/byte)"
            note = f"loss {step.loss:.3f}{held_out}  T {step.temperature:.3f}  {step.tokens_per_second:.0f} tokens/s"
            bar.update(task, completed=step.step / step.steps, note=note)
            if as_json and workers.is_first:
                print(json.dumps(step.as_dict()), flush=True)


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """The given settings by their names and types in ``TrainSettings``. Raises ValueError."""
    from dataclasses import fields

    from model.recipe import TrainSettings
    from server.config import parse_bytes

    changes = {field.name: given[field.name] for field in fields(TrainSettings) if field.name in given}
    if "final_temperature" in given:
        try:
            parts = tuple(float(part) for part in given["final_temperature"].split(","))
        except ValueError:
            value = given["final_temperature"]
            raise ValueError(f"final_temperature: {value!r} is neither a number nor numbers with commas") from None
        changes["final_temperature"] = parts[0] if len(parts) == 1 else parts
    if "shard_size" in given:
        changes["shard_bytes"] = parse_bytes(given["shard_size"])
    return changes
