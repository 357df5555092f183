"""``motserve bench``: how fast the parts are, beside the machine's limits."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.cli.terminal import JsonOption, ModelOption, print_result, progress, told

app = typer.Typer()
bench = typer.Typer(name="bench", no_args_is_help=True, help="Measure kernels, engine, server and grouping.")
app.add_typer(bench)

_Numbers = Annotated[str, typer.Option(help="Comma-separated.")]


def _list_of(name: str, text: str, kind: type[int] | type[float], low: float, high: float) -> list[Any]:
    """Raises ValueError naming the flag."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(low <= value <= high for value in values):
        raise ValueError(f"{name}: {text!r} is not a comma-separated list of numbers from {low:g} to {high:g}")
    return values


@bench.command("engine")
def engine(
    model: ModelOption = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape instead of a checkpoint.")] = None,
    concurrency: _Numbers = "1,8,32",
    private_share: _Numbers = "0,0.5,1",
    private_temperature: Annotated[float | None, typer.Option(help="Default: the checkpoint's pair.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 32,
    output_tokens: Annotated[int, typer.Option(min=2)] = 64,
    spread: Annotated[int, typer.Option(min=0, help="Prompts are up to so many tokens shorter.")] = 0,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    group_fill: str = "reference",
    as_json: JsonOption = False,
) -> None:
    """Decode and prefill tokens a second of the engine alone, and where a step's time goes."""
    from server.bench.engine import EngineLoad, bench_engine
    from server.bench.machine import measure_limits
    from server.bench.shapes import config_of, random_model
    from server.config import read_settings
    from server.engine.request import Privacy, RequestError
    from server.loading import build_engine, load, resolve_device, resolve_dtype

    with told(), progress("measuring") as (bar, task):
        shares = _list_of("private_share", private_share, float, 0, 1)
        counts = _list_of("concurrency", concurrency, int, 1, 4096)
        flags = {"device": device, "dtype": dtype, "kernels": kernels, "group_fill": group_fill}
        flags |= {"log_level": "error", "max_concurrent": max(counts), "kv_cache_memory": "4GiB"}
        settings = read_settings(flags if model is None else {**flags, "model": model}, None)
        if shape is None:
            loaded = load(settings)
            tested, default = loaded.engine.direct, loaded.engine.info.default_privacy
        else:
            config, on = config_of(shape), resolve_device(device)
            weights, fill = random_model(config, dtype=resolve_dtype(dtype, on), device=on)
            tested, default = build_engine(settings, weights, fill, None), Privacy(config.temperature, 0.01)
        if private_temperature is not None:
            default = Privacy(private_temperature, 0.0 if private_temperature == 0 else default.skip_below)
        limits = measure_limits(tested.runner.model.device, tested.runner.model.dtype)
        loads = [EngineLoad(count, share, prompt_tokens, output_tokens, spread) for count in counts for share in shares]
        try:
            for result in bench_engine(
                tested, loads, limits, default, repeats=repeats, progress=lambda done: bar.update(task, completed=done)
            ):
                named = {"shape": shape or "checkpoint", "dtype": str(tested.runner.model.dtype).split(".")[1]}
                print_result({**named, **result.as_dict(), **limits.as_dict()}, as_json=as_json)
        except RequestError as error:
            raise ValueError(str(error)) from None


@bench.command("kernel")
def kernel(
    shape: Annotated[str, typer.Option(help="demo, paper or mot-medium.")] = "demo",
    mode: Annotated[
        list[str] | None, typer.Option(help="public, private, private_unmixed, attention or sampling; all.")
    ] = None,
    groups: _Numbers = "1,2,4,8,16,32,64",
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    as_json: JsonOption = False,
) -> None:
    """The MoT layer, attention and sampling, beside read bandwidth, matmul rate and torch's batched product."""
    from server.bench.kernel import MODES, KernelBench
    from server.bench.machine import measure_limits
    from server.bench.shapes import config_of
    from server.loading import resolve_device, resolve_dtype, resolve_kernels

    with told(), progress("measuring") as (bar, task):
        unknown = [name for name in mode or () if name not in MODES]
        if unknown:
            raise ValueError(f"mode: {unknown[0]!r} is not one of {', '.join(MODES)}")
        config, on = config_of(shape), resolve_device(device)
        if not config.is_grouped:
            raise ValueError(f"shape: {shape!r} has no experts")
        counts = _list_of("groups", groups, int, 1, 4096)
        chosen = resolve_dtype(dtype, on)
        limits = measure_limits(on, chosen)
        tested = KernelBench(shape, config, chosen, limits, resolve_kernels(kernels, on))
        modes = [name for name in MODES if not mode or name in mode]
        for done, result in enumerate(tested.run(counts, modes), 1):
            bar.update(task, completed=done / len(modes) / len(counts))
            print_result({**result.as_dict(), **limits.as_dict()}, as_json=as_json)
