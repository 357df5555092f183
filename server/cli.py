"""The command line. Translates flags to settings and results to the terminal; nobody imports it.

Long commands show progress on standard error; with ``--json`` they print one JSON object a result on standard output
and nothing else there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from model.errors import CheckpointError, TrainingError
from server.config import Settings, read_settings

app = typer.Typer(name="motserve", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ModelOption = Annotated[Path | None, typer.Option("--model", help="Checkpoint folder; default: the bundled one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a result on standard output.")]


def main() -> None:
    app()


def _fail(message: str) -> NoReturn:
    print(f"motserve: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the user can mend is said in one line, without a traceback."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
    except (CheckpointError, TrainingError, ValueError, OSError) as error:
        _fail(str(error))


@contextlib.contextmanager
def _progress(label: str) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar, bar.add_task(label, total=1.0, note="")


def _print_result(values: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(values), flush=True)
        return
    parts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
    print("  ".join(parts), flush=True)


@app.command()
def serve(
    model: ModelOption = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name in /v1/models.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0: any free one. [8000]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the model.")] = None,
    kernels: Annotated[str | None, typer.Option(help="auto, native (compiled) or plain.")] = None,
    group_fill: Annotated[str | None, typer.Option(help="reference, zeros or none.")] = None,
    position_window: Annotated[str | None, typer.Option(help="auto, or 1 for exact position, or more.")] = None,
    max_groups: Annotated[int | None, typer.Option(help="Decode groups a step before merging.")] = None,
    private: Annotated[str | None, typer.Option(help="default-off, default-on or force.")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="TOML file of API keys; see `motserve key`.")] = None,
    kv_cache_memory: Annotated[str | None, typer.Option(help="Such as 1GiB or 512MB.")] = None,
    swap_memory: Annotated[str | None, typer.Option(help="For requests that make room for urgent ones. [1GiB]")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Sequences running at once. [256]")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Sequences queued before 429. [1024]")] = None,
    prefill_tokens: Annotated[int | None, typer.Option(help="Prompt tokens a step. [512]")] = None,
    max_body_bytes: Annotated[str | None, typer.Option(help="Larger request bodies get 413. [1MiB]")] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds until a request is cut off. [600]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these settings.")] = None,
) -> None:
    """Serve a checkpoint over HTTP. Every flag is also an environment variable MOTSERVE_…; flags win, then the
    environment, then the file."""
    flags = {name: value for name, value in locals().items() if name != "config" and value is not None}
    with _told():
        settings = read_settings(flags, config)
        _serve(settings)


def _serve(settings: Settings) -> None:
    import uvicorn  # a second to import: not for `motserve --help`

    from server.app import create_app
    from server.chat import ChatTemplate
    from server.loading import load

    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    loaded = load(settings)
    application = create_app(loaded.engine, settings, loaded.name, chat_template=ChatTemplate.load(loaded.folder))
    uvicorn.run(
        application, host=settings.host, port=settings.port, log_level=settings.log_level, access_log=False,
        timeout_graceful_shutdown=5,
    )  # fmt: skip


@app.command()
def key(
    file: Annotated[Path, typer.Argument(help="The key file; made where there is none.")],
    name: Annotated[str, typer.Argument(help="Whose key it is; shown nowhere but in the file.")],
    tenant: Annotated[str | None, typer.Option(help="Public requests of one tenant may mix. [the name]")] = None,
    private: Annotated[str | None, typer.Option(help="default-off, default-on or force. [the server's]")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Completions under way at once.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Make an API key: its hash goes into the file, the key itself to standard output, this once."""
    from server.auth import KeyEntry, add_key, hash_of, new_key

    with _told():
        secret = new_key()
        values = {
            "name": name, "sha256": hash_of(secret.encode()), "tenant": tenant, "private": private,
            "max_concurrent": max_concurrent, "requests_per_minute": requests_per_minute,
        }  # fmt: skip
        add_key(file, KeyEntry.model_validate(values))
        print(secret)


@app.command()
def generate(
    prompt: str,
    model: ModelOption = None,
    private: Annotated[bool, typer.Option("--private", help="Decode privately.")] = False,
    private_temperature: Annotated[float | None, typer.Option(help="0 to the checkpoint's temperature.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    seed: Annotated[int | None, typer.Option()] = None,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """One completion in the terminal, streaming."""
    from server.generate import stream_text

    if private_temperature is not None and not private:
        _fail("private_temperature: only with --private")
    with _told():
        settings = read_settings(
            {"model": model, "device": device, "dtype": dtype} if model else {"device": device, "dtype": dtype}, None
        )
        pieces = stream_text(
            settings, prompt, private=private, private_temperature=private_temperature, max_tokens=max_tokens,
            temperature=temperature, top_p=top_p, seed=seed,
        )  # fmt: skip
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="The run's folder; an unfinished run there is resumed.")],
    data: Annotated[list[Path], typer.Option("--data", help="Text file, plain or .xz; may be repeated.")],
    preset: Annotated[
        str, typer.Option(help="demo: the bundled checkpoint's recipe; tiny: seconds, for a try.")
    ] = "demo",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows a step; a multiple of the group size.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    final_temperature: Annotated[float | None, typer.Option(help="Annealed to in the last part.")] = None,
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
        if name not in ("out", "data", "preset", "start_from", "as_json") and value is not None
    }
    from model.train import Trainer, preset_named

    with _told(), _progress("training") as (bar, task):
        config, settings = preset_named(preset, changes)
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
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Record the reference crowd and pick the default private temperature and skip threshold."""
    from model import calibrate as calibration
    from model.evaluate import open_for_scoring

    with _told(), _progress("calibrating") as (bar, task):
        opened = open_for_scoring(model, validation, windows=windows)
        crowd = calibration.record_crowd(opened.model, opened.encode(data), model, seed=seed)
        evaluator = opened.evaluator(crowd)
        mixed = evaluator.run("mixed", temperature=0, skip_below=0)
        tried = []
        for number, candidate in enumerate(calibration.candidates(evaluator, mixed), 1):
            tried.append(candidate)
            bar.update(task, completed=min(0.99, number / 10), note=f"ratio {candidate.ratio:.4f}")
            _print_result({"mode": "private", **vars(candidate)}, as_json=as_json)
        chosen = calibration.choose(tried)
        calibration.save_pair(chosen, model)
        _print_result({"chosen": True, **vars(chosen), "fingerprint": crowd.fingerprint}, as_json=as_json)


@app.command("eval")
def evaluate(
    data: Annotated[Path, typer.Option(help="Text file, plain or .xz.")],
    model: ModelOption = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="mixed, private, private_unmixed, zeros or alone; all.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="At most so many windows; default: all of the text.")
    ] = None,
    private_temperature: Annotated[float | None, typer.Option(help="Default: the checkpoint's.")] = None,
    private_skip_below: Annotated[float | None, typer.Option(help="Default: the checkpoint's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity and bits per byte of a checkpoint in each way that the server can run it."""
    from model import reference
    from model.evaluate import MODES, open_for_scoring
    from server.loading import DEMO, load_privacy

    with _told(), _progress("evaluating") as (bar, task):
        unknown = [name for name in mode or () if name not in MODES]
        if unknown:
            raise ValueError(f"mode: {unknown[0]!r} is not one of {', '.join(MODES)}")
        folder = model or DEMO
        opened = open_for_scoring(folder, data, windows=windows)
        default = load_privacy(folder, opened.model.config)
        temperature = default.temperature if private_temperature is None else private_temperature
        skip_below = default.skip_below if private_skip_below is None else private_skip_below
        if not 0 <= temperature <= opened.model.config.temperature:
            raise ValueError(f"private_temperature must lie between 0 and {opened.model.config.temperature}")
        crowd = reference.load(folder, opened.model) if opened.model.config.is_mot else None
        evaluator = opened.evaluator(crowd)
        for name in MODES:
            if mode and name not in mode:
                continue
            bar.update(task, description=name, completed=0)
            found = evaluator.run(
                name, temperature=temperature, skip_below=skip_below,
                progress=lambda done: bar.update(task, completed=done),
            )  # fmt: skip
            _print_result(found.as_dict(), as_json=as_json)
